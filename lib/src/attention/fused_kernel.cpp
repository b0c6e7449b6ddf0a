// SPDX-License-Identifier: Apache-2.0
#include "fused_kernel.hpp"

#include <annulus/attention/fused_program.hpp>
#include <annulus/core/error.hpp>
#include <annulus/kernels/cuda.hpp>
#include <annulus/kernels/fused.hpp>

#include "device/cuda_access.hpp"
#include "gpu/cuda_handles.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <numbers>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

namespace {

namespace fused = kernels::cuda::fused;

class FusedAttention final : public PlannedAttention {
 public:
  FusedAttention(const RingPlan& plan, const TensorAddresses& addresses, Device& device)
      : device_(device), program_(fused_program(plan)), steps_(plan.steps.size()) {
    const Problem& problem = plan.problem;
    const auto allocate = [&](std::int64_t bytes) { return device.allocate(bytes, MemoryUse::tensor); };
    const auto bytes_of = [](const auto& list) { return static_cast<std::int64_t>(list.size() * sizeof(list[0])); };
    partials_ = allocate(fused::partial_bytes(problem.head_dim, 1) * program_.partials);
    tiles_ = allocate(program_.tiles * static_cast<std::int64_t>(sizeof(fused::Tile)));
    redo_ = allocate(program_.most_tiles * kRedoBytes);
    ticket_ = allocate(program_.tiles > 0 ? std::int64_t{sizeof(std::int32_t)} : 0);
    entries_ = allocate(bytes_of(program_.entries));
    begin_ = allocate(bytes_of(program_.begin));

    const std::vector<fused::Operand> operands = fused_operands(program_, plan, addresses);
    for (const FusedProgram::Launch& launch : program_.launches) {
      std::vector<fused::TileList> lists;
      translated([&] { lists = fused::make_tiles(launch.records, operands, problem.head_dim); });
      for (fused::TileList& list : lists) {
        translated([&] {
          steps_[static_cast<std::size_t>(launch.step)].push_back({fused::Launcher(list, operands, problem.dtype, problem.head_dim),
                                                                   static_cast<std::int64_t>(host_tiles_.size()),
                                                                   checked_narrow<std::int32_t>(std::ssize(list.tiles))});
        });
        host_tiles_.insert(host_tiles_.end(), list.tiles.begin(), list.tiles.end());
      }
    }
    ANNULUS_ASSERT(std::ssize(host_tiles_) == program_.tiles, "{} tiles where {} were counted", host_tiles_.size(), program_.tiles);
    program_.launches.clear();

    args_.ticket = reinterpret_cast<std::int32_t*>(ticket_.get());
    args_.redo = reinterpret_cast<std::uint32_t*>(redo_.get());
    args_.out = addresses.out;
    args_.lse = addresses.lse;
    args_.partial = partials_.get();
    args_.scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e);
    args_.head_dim = checked_narrow<std::int32_t>(problem.head_dim);

    combine_.dtype = problem.dtype;
    combine_.combine = combine_of(plan.pattern.mixing);
    combine_.batch = problem.batch;
    combine_.rows = plan.local_rows;
    combine_.heads = problem.heads;
    combine_.head_dim = problem.head_dim;
    combine_.output_scale = static_cast<float>(output_scale(plan.pattern));
    combine_.partial = partials_.get();
    combine_.entries = reinterpret_cast<const fused::CombineEntry*>(entries_.get());
    combine_.begin = reinterpret_cast<const std::int32_t*>(begin_.get());
    combine_.out = addresses.out;
    combine_.lse = addresses.lse;

    int number = 0;
    ANNULUS_CUDA(cudaGetDevice(&number));
    ANNULUS_CUDA(cudaDeviceGetAttribute(&blocks_, cudaDevAttrMultiProcessorCount, number));
  }

  void warm_up(Queue& queue) override {
    begin(queue);
    // One kernel serves all launches: a tile for each block of the first.
    for (const std::vector<Launch>& step : steps_) {
      if (step.empty()) { continue; }
      enqueue(queue, step.front(), std::min(step.front().count, blocks_));
      break;
    }
    finish(queue);
  }

  void begin(Queue& queue) override {
    prepare(queue);
    // What no record writes; all else is written over.
    if (program_.writes_rows) { combine(queue); }
  }

  void attend(Queue& queue, std::int64_t step) override {
    for (const Launch& launch : steps_[static_cast<std::size_t>(step)]) { enqueue(queue, launch, launch.count); }
  }

  void finish(Queue& queue) override {
    if (!program_.writes_rows) { combine(queue); }
  }

  bool count_cycles(Queue& queue) override {
    std::int64_t launches = 0;
    for (const std::vector<Launch>& step : steps_) { launches += std::ssize(step); }
    const std::int64_t bytes = launches * static_cast<std::int64_t>(sizeof(unsigned long long));
    if (launches == 0) { return true; }
    cycles_ = device_.allocate(bytes, MemoryUse::tensor);
    ANNULUS_CUDA(cudaMemsetAsync(cycles_.get(), 0, checked_narrow<std::size_t>(bytes), stream_of(queue)));
    counted_ = 0;
    return true;
  }

  double possible_flops(Queue& queue) override {
    if (cycles_.bytes() == 0) { return 0; }
    std::vector<unsigned long long> cycles(static_cast<std::size_t>(counted_));
    device_.download(queue, cycles.data(), cycles_.get(), static_cast<std::int64_t>(cycles.size() * sizeof(cycles[0])));
    queue.synchronize();
    cycles_ = {};
    const double sum = std::accumulate(cycles.begin(), cycles.end(), 0.0);
    return sum * fused::kFlopsPerCycle * blocks_;
  }

 private:
  static constexpr std::int64_t kRedoBytes = 8;

  struct Launch {
    fused::Launcher launcher;
    std::int64_t first = 0;  ///< of its tiles
    std::int32_t count = 0;
  };

  /// Brings lists to the device, once.
  void prepare(Queue& queue) {
    if (std::exchange(prepared_, true)) { return; }
    const auto upload = [&](const Buffer& to, const void* from) {
      if (to.bytes() > 0) { device_.upload(queue, to.get(), from, to.bytes()); }
    };
    upload(tiles_, host_tiles_.data());
    upload(entries_, program_.entries.data());
    upload(begin_, program_.begin.data());
    for (const Buffer* zeros : {&redo_, &ticket_}) {
      if (zeros->bytes() > 0) {
        ANNULUS_CUDA(cudaMemsetAsync(zeros->get(), 0, checked_narrow<std::size_t>(zeros->bytes()), stream_of(queue)));
      }
    }
    queue.synchronize();
    host_tiles_ = {};
  }

  void enqueue(Queue& queue, const Launch& launch, std::int32_t count) {
    if (drawn_ > std::numeric_limits<std::int32_t>::max() - count - 2 * blocks_) {
      ANNULUS_CUDA(cudaMemsetAsync(ticket_.get(), 0, sizeof(std::int32_t), stream_of(queue)));
      drawn_ = 0;
    }
    fused::Arguments args = args_;
    args.tiles = reinterpret_cast<const fused::Tile*>(tiles_.get()) + launch.first;
    args.tile_count = count;
    args.ticket_base = drawn_;
    if (cycles_.bytes() > 0) { args.cycles = reinterpret_cast<unsigned long long*>(cycles_.get()) + counted_++; }
    translated([&] { drawn_ += launch.launcher.launch(args, blocks_, stream_of(queue)); });
  }

  void combine(Queue& queue) {
    if (program_.begin.empty()) { return; }
    translated([&] { fused::combine(combine_, stream_of(queue)); });
  }

  Device& device_;
  FusedProgram program_;
  Buffer partials_;
  Buffer tiles_;
  Buffer redo_;
  Buffer ticket_;
  Buffer entries_;
  Buffer begin_;
  std::vector<std::vector<Launch>> steps_;
  std::vector<fused::Tile> host_tiles_;  ///< until they are on the device
  fused::Arguments args_{};
  fused::CombineTask combine_;
  Buffer cycles_;             ///< of each launch, while they are counted
  std::int64_t counted_ = 0;  ///< launches in it
  std::int32_t drawn_ = 0;    ///< tickets so far
  int blocks_ = 0;
  bool prepared_ = false;
};

class FusedKernel final : public AttentionKernel {
 public:
  explicit FusedKernel(Device& device) : device_(device) {}
  std::string describe() const override { return device_.describe() + ", kernel fused"; }
  /// It takes 16-bit inputs only.
  bool rounds_probabilities(DType /*dtype*/) const override { return true; }
  std::int64_t workspace_bytes(std::int64_t /*head_dim*/, DType /*dtype*/) const override { return 0; }
  Int128 plan_bytes(const RingPlan& plan) const override { return fused_bytes(fused_program(plan), plan.problem.head_dim); }
  std::unique_ptr<PlannedAttention> prepare(const RingPlan& plan, const TensorAddresses& addresses) override {
    return std::make_unique<FusedAttention>(plan, addresses, device_);
  }

 private:
  Device& device_;
};

}  // namespace

std::unique_ptr<AttentionKernel> make_fused_kernel(Device& device) { return std::make_unique<FusedKernel>(device); }

}  // namespace annulus
