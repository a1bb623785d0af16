# Run at every build: writes OUTPUT (a header) when the commit or the state of the tree changed, and only then, so that
# nothing recompiles for no reason.   cmake -DSOURCE_DIR=... -DOUTPUT=... -P git_commit.cmake
set(commit unknown)
set(dirty 0)
execute_process(COMMAND git -C ${SOURCE_DIR} rev-parse HEAD OUTPUT_VARIABLE head OUTPUT_STRIP_TRAILING_WHITESPACE
                RESULT_VARIABLE failed ERROR_QUIET)
if(NOT failed AND head)
  set(commit ${head})
  execute_process(COMMAND git -C ${SOURCE_DIR} --no-optional-locks status --porcelain --untracked-files=no
                  OUTPUT_VARIABLE changes ERROR_QUIET)
  if(changes)
    set(dirty 1)
  endif()
endif()
set(text "/* Written at build time by cmake/git_commit.cmake. */
#define KVS_GIT_COMMIT \"${commit}\"
#define KVS_GIT_DIRTY ${dirty}
")
set(old "")
if(EXISTS ${OUTPUT})
  file(READ ${OUTPUT} old)
endif()
if(NOT old STREQUAL text)
  file(WRITE ${OUTPUT} "${text}")
endif()
