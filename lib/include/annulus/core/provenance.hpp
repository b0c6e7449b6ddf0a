// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// The environment variables that may explain a result: names that begin with SLURM_, OMPI_, PMIX_, UCX_, NCCL_, CUDA_, OMP_, OPENBLAS_,
/// HDF5_ or ANNULUS_, and LD_LIBRARY_PATH; never one whose name holds KEY, TOKEN, SECRET or PASS. Sorted by name.
std::vector<std::pair<std::string, std::string>> recorded_environment();

}  // namespace annulus
