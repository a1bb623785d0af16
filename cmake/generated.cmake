# Files made at build time: the commit header, and pages that are compiled into the binary.
set(KVS_GIT_HEADER ${CMAKE_BINARY_DIR}/generated/kvs_git.h)
set(git_command ${CMAKE_COMMAND} -DSOURCE_DIR=${CMAKE_SOURCE_DIR} -DOUTPUT=${KVS_GIT_HEADER}
                -P ${CMAKE_SOURCE_DIR}/cmake/git_commit.cmake)
execute_process(COMMAND ${git_command}) # so that the file exists before the first dependency scan
add_custom_target(kvs_git_commit COMMAND ${git_command} BYPRODUCTS ${KVS_GIT_HEADER} COMMENT "" VERBATIM)
# KVS_GIT_COMMIT and KVS_GIT_DIRTY go to what writes manifests and prints versions: a commit recompiles these alone.
foreach(f ${TOOL_SOURCES} ${CLI_SOURCES})
  if(f MATCHES "/src/(bench|cli|server)/")
    set_property(SOURCE ${f} APPEND PROPERTY COMPILE_OPTIONS -include ${KVS_GIT_HEADER})
    set_property(SOURCE ${f} APPEND PROPERTY OBJECT_DEPENDS ${KVS_GIT_HEADER})
  endif()
endforeach()

# The report's page as C arrays, named kvs_ and the file's name.
set(EMBEDDED_SOURCES)
file(GLOB report_parts CONFIGURE_DEPENDS src/bench/report_*.html src/bench/report_*.css src/bench/report_*.js)
if(report_parts)
  set(report_c ${CMAKE_BINARY_DIR}/generated/report_page.c)
  add_custom_command(OUTPUT ${report_c}
    COMMAND ${CMAKE_COMMAND} -DOUTPUT=${report_c} -DPREFIX=kvs_ "-DINPUTS=${report_parts}"
            -P ${CMAKE_SOURCE_DIR}/cmake/embed.cmake
    DEPENDS ${report_parts} ${CMAKE_SOURCE_DIR}/cmake/embed.cmake
    COMMENT "Embedding the report's page" VERBATIM)
  list(APPEND EMBEDDED_SOURCES ${report_c})
endif()
