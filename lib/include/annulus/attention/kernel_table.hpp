// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace annulus {

/// Which head dims a kernel serves best.
enum class FastHeadDims {
  none,    ///< the kernel is for checking, not for speed
  all,     ///< one code for all of them
  listed,  ///< those that have tiles of their own; the others work, slower
};

/// One attention kernel of this binary and what it takes.
struct KernelInfo {
  BackendKind backend = BackendKind::reference;
  std::string kernel;                 ///< the name of --kernel; of backends with one kernel, how it works
  std::vector<DType> dtypes;          ///< of the inputs and the output
  std::int64_t head_dim_step = 1;     ///< head dims that work: its multiples
  std::int64_t largest_head_dim = 0;  ///< up to this
  FastHeadDims fast = FastHeadDims::none;
  std::vector<std::int64_t> fast_head_dims;  ///< with FastHeadDims::listed
  std::string products;                      ///< what multiplies: library and instructions, as found at run time
  std::string obstacle;                      ///< why this machine cannot run it; empty if it can
};

/// All kernels of this binary. Never throws for what the machine lacks.
std::vector<KernelInfo> kernel_table();

}  // namespace annulus
