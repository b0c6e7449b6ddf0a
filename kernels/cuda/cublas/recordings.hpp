// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/kernels/cublas.hpp>
#include <annulus/kernels/tasks.hpp>

#include "handles.hpp"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

namespace annulus::kernels::cuda {

/// Enqueues tasks on a stream, launch by launch. @returns the number of tiles
using Enqueue = std::function<std::int64_t(std::span<const AttendTask>, const CublasTiling&, cudaStream_t)>;

/// The lists of tasks that have been asked for, and the graphs of those that came back.
class Recordings {
 public:
  /// @param done  recorded by the caller after each submit(); outlives this
  Recordings(Enqueue enqueue, cudaEvent_t done) : enqueue_(std::move(enqueue)), done_(done) {}

  /// Launches the list's graph, or enqueues the list and takes a step towards a graph of it.
  void submit(std::span<const AttendTask> tasks, const CublasTiling& tiling, const std::byte* workspace, cudaStream_t stream);
  /// Drops what is recorded for a workspace.
  void forget(const std::byte* workspace);

  std::int64_t count() const { return static_cast<std::int64_t>(recordings_.size()); }
  std::int64_t graph_launches() const { return graph_launches_; }

 private:
  /// A list of tasks that has been asked for, and the graph of it. The nodes hold addresses: of the tasks' memory and of the workspace,
  /// where the arrays of pointers lie too; these are written by a node ahead of the products that read them.
  struct Recording {
    std::vector<AttendTask> tasks;
    CublasTiling tiling;
    const std::byte* workspace = nullptr;
    bool recordable = false;  ///< not too large, and no attempt has failed
    std::int64_t nodes = 0;   ///< of the graph; without one, as many as are expected
    std::int64_t last_use = 0;
    Owned<cudaGraphExec_t> graph;
  };

  /// Keeps `recording` in place of the one unused for longest.
  void remember(Recording recording);
  /// Drops graphs out of use, if need be. Those in use stay: a loop over more than fits would drop each before its turn comes.
  /// @returns whether a graph of `nodes` may be added
  bool make_room(std::int64_t nodes);
  void drop_graph(Recording& recording);
  /// Makes the graph of a list. Without success the list stays eager: what is really broken will fail there, with better words.
  void record(Recording& recording, cudaStream_t stream);
  /// @returns false if there was nothing to launch after all; nothing is enqueued then
  bool launch(Recording& recording, cudaStream_t stream);

  Enqueue enqueue_;
  cudaEvent_t done_;
  std::vector<Recording> recordings_;
  std::int64_t nodes_ = 0;  ///< of all graphs
  std::int64_t calls_ = 0;
  std::int64_t graph_launches_ = 0;
};

}  // namespace annulus::kernels::cuda
