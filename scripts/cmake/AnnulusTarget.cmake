# SPDX-License-Identifier: Apache-2.0
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
    PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion>
            # CMake 3.25 knows no CUDA_STANDARD 20 for nvcc.
            $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>
            # The code that nvcc generates for the host compiler does not survive -Wpedantic.
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wshadow>)
  if(ANNULUS_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>
                                             $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror;--Werror=all-warnings>)
  endif()
  target_compile_definitions(${target} PRIVATE ANNULUS_ENABLE_CUDA=$<BOOL:${ANNULUS_ENABLE_CUDA}>
                                               ANNULUS_ENABLE_NCCL=$<BOOL:${ANNULUS_ENABLE_NCCL}>)
endfunction()
