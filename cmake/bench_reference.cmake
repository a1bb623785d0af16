# build/reference-kernels: Kvasir's kernels beside those of other libraries, for scripts/bench-kernels. What is not
# installed is left out, and the table says so.
set(KVS_ONEDNN_DIR "" CACHE PATH "Folder with oneDNN's include and lib, when it is not the system's")
set(KVS_NATIVE_GGML ${CMAKE_SOURCE_DIR}/.prefix/native-ggml CACHE PATH
    "Folder with the lib of a ggml built for this CPU; without one, the ggml that Kvasir links")
find_path(KVS_CBLAS_INCLUDE cblas.h PATH_SUFFIXES openblas openblas-pthread
          ${CMAKE_LIBRARY_ARCHITECTURE}/openblas-pthread ${CMAKE_LIBRARY_ARCHITECTURE}/openblas)
find_library(KVS_OPENBLAS openblas PATH_SUFFIXES openblas-pthread)
find_path(KVS_ONEDNN_INCLUDE dnnl.hpp HINTS ${KVS_ONEDNN_DIR}/include)
find_library(KVS_ONEDNN dnnl HINTS ${KVS_ONEDNN_DIR}/lib)
mark_as_advanced(KVS_CBLAS_INCLUDE KVS_OPENBLAS KVS_ONEDNN_INCLUDE KVS_ONEDNN)

set(reference ${CMAKE_SOURCE_DIR}/tests/bench/reference)
add_executable(reference-kernels EXCLUDE_FROM_ALL ${reference}/main.c ${reference}/kvasir.c ${reference}/ggml.c)
set_target_properties(reference-kernels PROPERTIES LINKER_LANGUAGE CXX)
if(KVS_OPENBLAS AND KVS_CBLAS_INCLUDE)
  target_sources(reference-kernels PRIVATE ${reference}/openblas.c)
  target_compile_definitions(reference-kernels PRIVATE HAVE_OPENBLAS)
  target_include_directories(reference-kernels SYSTEM PRIVATE ${KVS_CBLAS_INCLUDE})
  target_link_libraries(reference-kernels PRIVATE ${KVS_OPENBLAS})
endif()
if(KVS_ONEDNN AND KVS_ONEDNN_INCLUDE)
  # An object library: kvs_flags holds options that only C knows.
  add_library(reference-onednn OBJECT EXCLUDE_FROM_ALL ${reference}/onednn.cpp)
  target_compile_options(reference-onednn PRIVATE -Wall -Wextra -Wshadow $<$<BOOL:${KVS_WERROR}>:-Werror>)
  target_include_directories(reference-onednn SYSTEM PRIVATE ${KVS_ONEDNN_INCLUDE})
  target_sources(reference-kernels PRIVATE $<TARGET_OBJECTS:reference-onednn>)
  target_compile_definitions(reference-kernels PRIVATE HAVE_ONEDNN)
  target_link_libraries(reference-kernels PRIVATE ${KVS_ONEDNN})
endif()
# In front of the static ggml behind kvs, of which nothing is then taken.
if(EXISTS ${KVS_NATIVE_GGML}/lib/libggml.so)
  foreach(part ggml ggml-cpu ggml-base)
    target_link_libraries(reference-kernels PRIVATE ${KVS_NATIVE_GGML}/lib/lib${part}.so)
  endforeach()
endif()
target_link_libraries(reference-kernels PRIVATE kvs_flags kvs)
add_dependencies(kernel-bench reference-kernels)
