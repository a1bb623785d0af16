# Turns text files into C arrays, so that pages stay readable files and the binary needs no files at run time.
#   cmake -DOUTPUT=x.c -DPREFIX=kvs_ "-DINPUTS=a/page.html;a/page.js" -P cmake/embed.cmake
# gives x.c with `const char kvs_page_html[]` and `const char kvs_page_js[]`, each with a NUL at its end.
# Arrays of characters and not string literals: C guarantees literals of 4,095 bytes only.
foreach(needed OUTPUT PREFIX INPUTS)
  if(NOT DEFINED ${needed})
    message(FATAL_ERROR "embed.cmake: -D${needed}=... is missing")
  endif()
endforeach()

set(text "/* Made by cmake/embed.cmake; change the source files instead. */\n")
foreach(input IN LISTS INPUTS)
  get_filename_component(name "${input}" NAME)
  string(MAKE_C_IDENTIFIER "${name}" name)
  file(READ "${input}" hex HEX)
  if(hex STREQUAL "")
    message(FATAL_ERROR "embed.cmake: ${input} is empty or missing")
  endif()
  # Character constants, so that bytes over 0x7f need no conversion to a signed char.
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "'\\\\x\\1'," bytes "${hex}")
  string(REPLACE "'\\x0a'," "'\\x0a',\n    " bytes "${bytes}")
  string(APPEND text "extern const char ${PREFIX}${name}[];\nconst char ${PREFIX}${name}[] = {\n    ${bytes}'\\0'};\n")
endforeach()

file(WRITE "${OUTPUT}" "${text}")
