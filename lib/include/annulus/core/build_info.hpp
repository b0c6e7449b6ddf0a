// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace annulus {

/// What this binary is and what it was built with. Empty strings: built without.
struct BuildInfo {
  std::string_view version;     ///< of the project: "0.1.0"
  std::string_view git;         ///< git describe, "-dirty" with uncommitted changes; "unknown" outside a checkout
  std::string_view compiler;    ///< "GNU 12.2.0"
  std::string_view build_type;  ///< "Release"
  std::string_view cpu_gemm;    ///< library of the cpu backend's products: "libxsmm" or "openblas"
  std::string_view cuda;        ///< toolkit version
  std::string_view cuda_archs;  ///< architectures compiled for, comma separated
  std::string_view nccl;        ///< version of the header
  std::string_view hdf5;        ///< version of the header
  bool hdf5_parallel = false;   ///< whether HDF5 has MPI-IO
  std::string_view mpi;         ///< MPI standard of the header: "3.1"
};

/// The same for every call; valid for the life of the process.
const BuildInfo& build_info();

/// One line that names the MPI library found at run time. May be called before MPI_Init.
std::string mpi_library_version();

/// Whether the MPI library takes pointers to GPU memory.
enum class MpiCudaSupport {
  yes,
  no,
  unknown,  ///< the library has no way to say
};

/// Between MPI_Init and MPI_Finalize as the library found it; before, as the library was built. May be called at any time.
MpiCudaSupport mpi_cuda_support();

}  // namespace annulus
