# SPDX-License-Identifier: Apache-2.0
# In every build, not only where warnings are errors: an enumeration that grows does not compile before every switch over it has been looked
# at, even where it has a default. A foreign enumeration is switched over as an int.
set(ANNULUS_EXHAUSTIVE_SWITCHES -Werror=switch -Werror=switch-enum)
list(JOIN ANNULUS_EXHAUSTIVE_SWITCHES "," ANNULUS_EXHAUSTIVE_SWITCHES_OF_NVCC)

# annulus_configure_target(<target>): what every target of this project is compiled with and nothing passes on to its users.
function(annulus_configure_target target)
  set_target_properties(
    ${target}
    PROPERTIES CXX_EXTENSIONS OFF
               POSITION_INDEPENDENT_CODE ON
               VERIFY_INTERFACE_HEADER_SETS ON)
  target_compile_features(${target} PUBLIC cxx_std_20)

  target_compile_options(
    ${target}
    PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;${ANNULUS_EXHAUSTIVE_SWITCHES}>
            # CMake 3.25 knows no CUDA_STANDARD 20 for nvcc.
            $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>
            # The code that nvcc generates for the host compiler does not survive -Wpedantic.
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wshadow,${ANNULUS_EXHAUSTIVE_SWITCHES_OF_NVCC}>)
  if(ANNULUS_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>
                                             $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror;--Werror=all-warnings>)
  endif()
  target_compile_definitions(${target} PRIVATE ANNULUS_ENABLE_CUDA=$<BOOL:${ANNULUS_ENABLE_CUDA}>
                                               ANNULUS_ENABLE_NCCL=$<BOOL:${ANNULUS_ENABLE_NCCL}>)
endfunction()
