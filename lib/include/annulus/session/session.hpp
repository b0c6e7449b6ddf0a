// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/executor.hpp>
#include <annulus/attention/layer_executor.hpp>
#include <annulus/core/config.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/io/file_identity.hpp>
#include <annulus/io/layer_source.hpp>
#include <annulus/io/source.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/pattern/grid_cell.hpp>
#include <annulus/pattern/partition.hpp>
#include <annulus/plan/plan.hpp>
#include <annulus/plan/plan_cache.hpp>
#include <annulus/transport/make_transport.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// Whether a run moves KV blocks, or attends whatever the slots hold: the same blocks without passing, for overlap efficiency.
enum class Passing { on, off };

/// A configuration with everything filled in that depends on the input file and on the job.
struct ResolvedConfig {
  Config config;
  std::shared_ptr<const TensorSource> source;  ///< of Q, K and V; null where a layer makes them
  std::shared_ptr<const LayerSource> layer;    ///< null where there is no layer
  std::int64_t ranks = 1;                      ///< processes, or virtual ranks

  const InputSource& input() const;
  /// Of the values that are read.
  DType input_dtype() const;
};

/// Opens the input (or generator), takes shapes, dtype and scale from it, fills in defaults and validates all of it. Collective: all ranks
/// succeed or all throw the same AgreedError.
ResolvedConfig resolve(Config asked, const Communicator& comm);

/// The files that a configuration names, and those where standard output and error go; with what its input reads besides, once it is open.
std::vector<NamedFile> named_files(const Config& config, const InputSource* input = nullptr);

/// As resolve(), for the ranks that are planned for and whose values are not read. @throws InvalidArgument
ResolvedConfig resolve_without_job(Config asked);

/// What the layer of a resolved configuration takes on a rank that owns `rows` tokens of each batch entry of its ring's problem.
LayerCost layer_cost_of(const Config& config, const LayerSource& source, const Problem& problem, std::int64_t rows);

/// How a resolved configuration routes blocks and orders keys.
/// @throws InvalidArgument if its kernel keeps no order of keys and one is asked for
Routing routing_of(const Config& config);

/// CPUs this process may use divided by the ranks of this host that may use the same ones; at least 1. Collective.
std::int64_t default_threads(const Communicator& comm);

/// Puts something around a rank's transport, to observe or disturb it.
using TransportDecorator = std::function<std::unique_ptr<Transport>(std::unique_ptr<Transport>)>;

/// Part `index` of `parts` of a problem's batch, all heads and rows of neighbouring batch entries, as even as entries allow.
GridCell part_of_batch(const Problem& whole, std::int64_t parts, std::int64_t index);

/// A rank's memory would not suffice.
class MemoryShortage : public AgreedError {
 public:
  MemoryShortage(const AgreedError& refusal, double times) : AgreedError(refusal), times_(times) {}
  /// What the plan needs of what is free, on the rank that lacks most.
  double times() const noexcept { return times_; }

 private:
  double times_;
};

/// The ranks of one ring that run in this process: one of them, or in a job of one process all.
struct LocalRing {
  std::int64_t number = 0;
  GridCell cell;
  std::span<const std::unique_ptr<RingExecutor>> executors;  ///< in the order of their ranks
  std::span<const std::unique_ptr<LayerExecutor>> layers;    ///< by executor; none without a layer
};

/// The ranks of this process, ready to run: device, kernel, transports, executors. Collective construction. What they attend is the problem
/// or one part of its batch; rows and batch entries are numbered in the whole.
class Session {
 public:
  /// @throws AgreedError if the configuration does not fit the job; MemoryShortage, with the numbers
  /// @param plans  keeps the plans for later sessions; may be null @param part  as part_of_batch(); by default the whole
  Session(const ResolvedConfig& resolved, const Communicator& comm, const TransportDecorator& decorate = {}, PlanCache* plans = nullptr,
          std::optional<GridCell> part = std::nullopt);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Goes on with another part of the batch. @return whether it can: the part must be of an equal problem
  bool move_to(const GridCell& part);

  /// Reads the ranks' rows. Collective.
  void load();
  /// One attention, and the layer around it if there is one; returns when this process's ranks have finished. Collective; failures inside
  /// end the job.
  void run(Passing passing = Passing::on);

  /// All that is attended, by all rings together.
  const Problem& problem() const;
  const Pattern& pattern() const;
  /// Of the sequence among the ranks of a ring.
  const Partition& partition() const { return partition_; }
  const Grid& grid() const { return resolved_.config.places; }
  /// What is read of the input that has a row for each token.
  std::vector<Tensor> tensors() const;
  /// Whether positions of the plan are not rows of the input.
  bool is_permuted() const;
  /// Whether rows go to their ranks one by one, and not in ranges of the input: of a permuted sequence, and where ranks own stripes.
  bool moves_rows() const;
  const ResolvedConfig& resolved() const { return resolved_; }
  Device& device() const { return *device_; }
  const AttentionKernel& kernel() const { return *kernel_; }
  const Communicator& comm() const { return comm_; }
  /// The ranks of this process's ring; comm() if there is only one ring, or one process.
  const Communicator& ring_comm() const { return ring_comm_; }
  std::span<const LocalRing> rings() const { return rings_; }
  /// What a ring attends.
  GridCell cell(std::int64_t ring) const;
  /// Null if no rank of the ring runs here.
  const LocalRing* local_ring(std::int64_t number) const;
  /// The ring of a rank of the job.
  std::int64_t ring_of(std::int64_t rank) const { return rank / grid().seq; }
  TransportKind transport_kind() const { return transports_.front()->kind(); }
  std::int64_t ranks() const { return resolved_.ranks; }
  /// Of all rings here, in the order of their ranks in the job.
  std::span<const std::unique_ptr<RingExecutor>> executors() const { return executors_; }
  /// By executor; none without a layer.
  std::span<const std::unique_ptr<LayerExecutor>> layers() const { return layers_; }

  /// Milliseconds of the last run, of the slowest rank. Collective.
  double slowest_ms();
  /// Of them, those of the backward pass, of the rank on which it took longest; 0 without gradients. Collective.
  double backward_ms();
  /// Of all, those that the layer took before and after the attention. Collective.
  struct LayerMs {
    double project = 0;
    double finish = 0;
  };
  LayerMs layer_ms();
  /// Timings of the last run of this process's ranks, [rank][step].
  std::vector<std::vector<StepTiming>> local_timings();
  /// The plan's prediction for this process (all its ranks) and the kernel's workspace.
  std::int64_t predicted_bytes() const { return predicted_bytes_; }

 private:
  /// load() of a sequence in its own order.
  void load_ranges();
  /// What load() takes besides, without a layer: the extra keys, to the ranks that own them.
  void load_extra_keys();
  /// load() of a layer.
  void load_layer();
  /// What the layer takes on this process, by plan. Weights and scratch are shared.
  std::int64_t layer_bytes(std::span<const std::shared_ptr<const RingPlan>> plans) const;
  void make_layers();

  const ResolvedConfig& resolved_;
  const Communicator& comm_;
  GridCell part_;
  Communicator ring_comm_;
  Partition partition_;
  Unwinding unwinding_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<AttentionKernel> kernel_;
  std::vector<std::unique_ptr<Transport>> transports_;
  std::unique_ptr<Queue> queue_;
  std::vector<std::unique_ptr<RingExecutor>> executors_;
  std::unique_ptr<LayerResources> layer_resources_;
  std::vector<std::unique_ptr<LayerExecutor>> layers_;
  std::vector<LocalRing> rings_;
  std::int64_t predicted_bytes_ = 0;
};

/// Timings of all ranks of the ring, on rank 0 only, from what each process has of its own. Collective.
std::vector<std::vector<StepTiming>> gather_timings(const Communicator& comm, const std::vector<std::vector<StepTiming>>& local);

}  // namespace annulus
