# SPDX-License-Identifier: Apache-2.0
# cmake -DSOURCE_DIR=... -DOUTPUT=... -P WriteGitState.cmake: writes `git describe` as a C++ string literal. The file is touched only when
# the text changes, so that a build without changes compiles nothing.
cmake_minimum_required(VERSION 3.25)

find_program(GIT git)
set(state "")
if(GIT)
  execute_process(
    COMMAND "${GIT}" describe --tags --always --dirty
    WORKING_DIRECTORY "${SOURCE_DIR}"
    OUTPUT_VARIABLE state
    ERROR_QUIET
    OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT state)
  set(state "unknown")
endif()
file(CONFIGURE OUTPUT "${OUTPUT}" CONTENT "\"@state@\"\n" @ONLY)
