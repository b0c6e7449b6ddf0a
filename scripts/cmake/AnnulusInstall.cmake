# SPDX-License-Identifier: Apache-2.0
# bin/annulus with its manual page and completion, share/annulus/presets and machines, and the library with its headers as a CMake package (`find_package(annulus)`, annulus::lib).
include(CMakePackageConfigHelpers)

install(TARGETS annulus RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
install(
  TARGETS annulus_lib annulus_kernels
  EXPORT annulusTargets
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
  FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(DIRECTORY configs/presets configs/machines DESTINATION "${CMAKE_INSTALL_DATADIR}/annulus" FILES_MATCHING PATTERN "*.toml")
install(FILES "${PROJECT_BINARY_DIR}/app/annulus.1" DESTINATION "${CMAKE_INSTALL_MANDIR}/man1")
install(FILES "${PROJECT_BINARY_DIR}/app/annulus.bash" DESTINATION "${CMAKE_INSTALL_DATADIR}/bash-completion/completions" RENAME annulus)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/annulus")
install(
  EXPORT annulusTargets
  NAMESPACE annulus::
  DESTINATION "${package_dir}")
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/scripts/cmake/annulusConfig.cmake.in" "${PROJECT_BINARY_DIR}/annulusConfig.cmake"
  INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/annulusConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/annulusConfig.cmake" "${PROJECT_BINARY_DIR}/annulusConfigVersion.cmake" DESTINATION "${package_dir}")
if(ANNULUS_ENABLE_NCCL)
  install(FILES "${PROJECT_SOURCE_DIR}/scripts/cmake/FindNCCL.cmake" DESTINATION "${package_dir}")
endif()
