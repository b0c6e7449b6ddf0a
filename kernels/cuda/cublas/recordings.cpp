// SPDX-License-Identifier: Apache-2.0
#include "recordings.hpp"

#include <algorithm>
#include <utility>

namespace annulus::kernels::cuda {
namespace {

constexpr std::size_t kMostRecordings = 256;
// A node costs the driver some kilobytes on the host and on the device, and a graph's instantiation some microseconds for each.
constexpr std::int64_t kMostGraphNodes = 32768;
constexpr std::int64_t kMostNodesOfAllGraphs = 65536;
constexpr std::int64_t kNodesPerTile = 4;  // pointers, product, softmax, product

/// While it lasts, work enqueued on the stream, and on those that join it through events, is recorded instead of run.
class Capture {
 public:
  // Thread-local: what other threads ask of the device meanwhile (transports, watchdogs) is none of its business.
  explicit Capture(cudaStream_t stream) : stream_(stream) {
    ANNULUS_KERNELS_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture() {
    if (stream_ == nullptr) { return; }
    cudaGraph_t graph = nullptr;
    static_cast<void>(cudaStreamEndCapture(stream_, &graph));
    const Owned<cudaGraph_t> dropped(graph);
    static_cast<void>(cudaGetLastError());
  }
  /// @returns what was recorded; every stream is out of the capture, also when this throws
  Owned<cudaGraph_t> end() {
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(std::exchange(stream_, nullptr), &graph);
    Owned<cudaGraph_t> owner(graph);
    check(status, "cudaStreamEndCapture");
    return owner;
  }

 private:
  cudaStream_t stream_;
};

}  // namespace

void Recordings::submit(std::span<const AttendTask> tasks, const CublasTiling& tiling, const std::byte* workspace, cudaStream_t stream) {
  ++calls_;
  const auto known = std::find_if(recordings_.begin(), recordings_.end(), [&](const Recording& each) {
    return each.workspace == workspace && each.tiling == tiling &&
           std::equal(each.tasks.begin(), each.tasks.end(), tasks.begin(), tasks.end());
  });
  if (known == recordings_.end()) {
    // Eager the first time: the library and the driver load what they need.
    const std::int64_t nodes = kNodesPerTile * enqueue_(tasks, tiling, stream);
    remember({{tasks.begin(), tasks.end()}, tiling, workspace, nodes <= kMostGraphNodes, nodes, calls_, nullptr});
    return;
  }
  known->last_use = calls_;
  if (known->graph == nullptr && known->recordable && make_room(known->nodes)) { record(*known, stream); }
  if (known->graph == nullptr || !launch(*known, stream)) { enqueue_(tasks, tiling, stream); }
}

void Recordings::forget(const std::byte* workspace) {
  for (Recording& each : recordings_) {
    if (each.workspace == workspace) { drop_graph(each); }
  }
  std::erase_if(recordings_, [&](const Recording& each) { return each.workspace == workspace; });
}

void Recordings::remember(Recording recording) {
  if (recordings_.size() < kMostRecordings) {
    recordings_.push_back(std::move(recording));
    return;
  }
  const auto oldest = std::min_element(recordings_.begin(), recordings_.end(),
                                       [](const Recording& a, const Recording& b) { return a.last_use < b.last_use; });
  drop_graph(*oldest);
  *oldest = std::move(recording);
}

bool Recordings::make_room(std::int64_t nodes) {
  if (nodes_ + nodes <= kMostNodesOfAllGraphs) { return true; }
  for (Recording& each : recordings_) {
    if (calls_ - each.last_use > 2 * static_cast<std::int64_t>(kMostRecordings)) { drop_graph(each); }
  }
  return nodes_ + nodes <= kMostNodesOfAllGraphs;
}

void Recordings::drop_graph(Recording& recording) {
  if (recording.graph == nullptr) { return; }
  ANNULUS_KERNELS_CHECK(cudaEventSynchronize(done_));  // it may be running
  recording.graph.reset();
  nodes_ -= recording.nodes;
}

void Recordings::record(Recording& recording, cudaStream_t stream) {
  try {
    Capture capture(stream);
    enqueue_(recording.tasks, recording.tiling, stream);
    const Owned<cudaGraph_t> graph = capture.end();
    std::size_t nodes = 0;
    ANNULUS_KERNELS_CHECK(cudaGraphGetNodes(graph.get(), nullptr, &nodes));
    recording.recordable = nodes <= static_cast<std::size_t>(kMostGraphNodes);
    if (!recording.recordable) { return; }
    cudaGraphExec_t executable = nullptr;
    ANNULUS_KERNELS_CHECK(cudaGraphInstantiate(&executable, graph.get(), 0));
    recording.graph.reset(executable);
    recording.nodes = static_cast<std::int64_t>(nodes);
    nodes_ += recording.nodes;
  } catch (const LibraryError&) { recording.recordable = false; }
}

bool Recordings::launch(Recording& recording, cudaStream_t stream) {
  if (cudaGraphLaunch(recording.graph.get(), stream) == cudaSuccess) {
    ++graph_launches_;
    return true;
  }
  static_cast<void>(cudaGetLastError());
  drop_graph(recording);
  recording.recordable = false;
  return false;
}

}  // namespace annulus::kernels::cuda
