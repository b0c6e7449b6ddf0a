// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/fused.hpp>

#include "tensor_maps.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace annulus::kernels::cuda::fused {
namespace {

constexpr int kShapes = static_cast<int>(sizeof(kTileShapes) / sizeof(kTileShapes[0]));
using Launch = void (*)(const TensorMaps&, const Arguments&, int, cudaStream_t);

template <class Element, int... kIndices>
constexpr std::array<Launch, kShapes> launches(std::integer_sequence<int, kIndices...> /*indices*/) {
  return {launch_tiles<Element, kIndices>...};
}

Launch launch_for(DType dtype, std::size_t shape) {
  const auto indices = std::make_integer_sequence<int, kShapes>();
  switch (dtype) {
    case DType::fp16:
      return launches<__half>(indices)[shape];
    case DType::bf16:
      return launches<__nv_bfloat16>(indices)[shape];
    case DType::fp32:
      break;
  }
  throw std::invalid_argument("the fused kernel takes bf16 and fp16");
}

}  // namespace

struct Launcher::State {
  TensorMaps maps;
  Launch launch;
};

Launcher::Launcher(const TileList& list, std::span<const Operand> operands, DType dtype, std::int64_t head_dim)
    : state_(std::make_unique<State>()) {
  if (list.maps.size() > kMaxMaps) {
    throw std::invalid_argument("the records need " + std::to_string(list.maps.size()) + " tensor maps, at most " +
                                std::to_string(kMaxMaps) + " are possible");
  }
  state_->launch = launch_for(dtype, static_cast<std::size_t>(shape_of(head_dim)));
  for (std::size_t i = 0; i < list.maps.size(); ++i) {
    state_->maps.map[i] = encode(list.maps[i], operands[static_cast<std::size_t>(list.maps[i].operand)], dtype, head_dim);
  }
}
Launcher::Launcher(Launcher&&) noexcept = default;
Launcher& Launcher::operator=(Launcher&&) noexcept = default;
Launcher::~Launcher() = default;

std::int32_t Launcher::launch(const Arguments& args, int blocks, CUstream_st* stream) const {
  if (args.tile_count == 0) { return 0; }
  state_->launch(state_->maps, args, blocks, stream);
  return args.tile_count + blocks;
}

}  // namespace annulus::kernels::cuda::fused
