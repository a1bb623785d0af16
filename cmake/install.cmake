# `make install`: the binary, libkvasir.so with its headers, pkg-config and CMake files, man page and completions.
include(CMakePackageConfigHelpers)
install(TARGETS kvasir_shared EXPORT kvasirTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${PUBLIC_HEADERS} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

# The prefix is found from the file's own place, so that a moved or DESTDIR-staged tree works without editing.
file(RELATIVE_PATH pc_to_prefix /p/${CMAKE_INSTALL_LIBDIR}/pkgconfig /p)
string(REGEX REPLACE "/$" "" pc_to_prefix "${pc_to_prefix}")
file(WRITE ${CMAKE_BINARY_DIR}/kvasir.pc
"prefix=\${pcfiledir}/${pc_to_prefix}
libdir=\${prefix}/${CMAKE_INSTALL_LIBDIR}
includedir=\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}

Name: kvasir
Description: Long conversations with a language model inside a hard KV-cache budget
Version: ${PROJECT_VERSION}
Libs: -L\${libdir} -lkvasir
Cflags: -I\${includedir}
")
install(FILES ${CMAKE_BINARY_DIR}/kvasir.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

set(cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kvasir)
install(EXPORT kvasirTargets NAMESPACE kvasir:: DESTINATION ${cmake_dir})
file(WRITE ${CMAKE_BINARY_DIR}/kvasirConfig.cmake "include(\"\${CMAKE_CURRENT_LIST_DIR}/kvasirTargets.cmake\")\n")
write_basic_package_version_file(${CMAKE_BINARY_DIR}/kvasirConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/kvasirConfig.cmake ${CMAKE_BINARY_DIR}/kvasirConfigVersion.cmake
        DESTINATION ${cmake_dir})

if(TARGET kvasir)
  install(TARGETS kvasir RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  # The program prints its own man page and completions, so they cannot disagree with its options.
  set(KVS_BINARY_PATH ${CMAKE_BINARY_DIR}/kvasir)
  install(CODE "
    set(binary \"${KVS_BINARY_PATH}\")
    set(data \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_DATAROOTDIR}\")
    function(kvs_printed file)
      string(REPLACE \";\" \" \" words \"\${ARGN}\")
      execute_process(COMMAND \"\${binary}\" \${ARGN} OUTPUT_VARIABLE text RESULT_VARIABLE failed ERROR_QUIET)
      if(failed OR NOT text)
        message(STATUS \"Left out: \${file} (kvasir \${words} printed none)\")
      else()
        file(WRITE \"\${data}/\${file}\" \"\${text}\")
        message(STATUS \"Installing: \${data}/\${file}\")
      endif()
    endfunction()
    kvs_printed(man/man1/kvasir.1 --man)
    kvs_printed(bash-completion/completions/kvasir --completion bash)
    kvs_printed(zsh/site-functions/_kvasir --completion zsh)
    kvs_printed(fish/vendor_completions.d/kvasir.fish --completion fish)
  ")
endif()
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
