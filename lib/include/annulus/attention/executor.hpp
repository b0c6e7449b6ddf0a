// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/attention_kernel.hpp>
#include <annulus/attention/lower.hpp>
#include <annulus/core/step_timing.hpp>
#include <annulus/device/device.hpp>
#include <annulus/io/source.hpp>
#include <annulus/job/watchdog.hpp>
#include <annulus/plan/plan.hpp>
#include <annulus/transport/transport.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace annulus {

/// Runs one rank's plan on one device over one transport, op by op.
///
/// It owns the rank's tensors, slots and partials (allocated once). Everything is enqueued on `queue`; `kernel`, `device`, `transport`,
/// `queue` and `watchdog` must outlive it. An attention never writes Q, K and V.
class RingExecutor {
 public:
  RingExecutor(std::shared_ptr<const RingPlan> plan, AttentionKernel& kernel, Device& device, Transport& transport, Queue& queue,
               Watchdog& watchdog);
  // The kernel knows the plan by its address.
  RingExecutor(const RingExecutor&) = delete;
  RingExecutor& operator=(const RingExecutor&) = delete;

  /// Tells the transport where every step's messages will lie. Collective over the transport's ranks; once, before the first op.
  void connect();

  /// Reads the rank's rows of Q, K and V, of dO where the plan has gradients, and the extra keys if it owns them. Returns when they are in
  /// place.
  void load(const TensorSource& source);
  /// The extra keys and their values alone; nothing on ranks that do not own them.
  void load_extra_keys(const TensorSource& source);
  void load(const TensorSource& source, Tensor tensor);
  /// Of one tensor, rows [first, first + count) of one batch entry, all of them this rank's.
  void load_rows(const TensorSource& source, Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count);

  /// Takes rows of one tensor that are not read in order: those of one batch entry with the global numbers `numbers`, all of them this
  /// rank's, from `rows` [numbers, heads of that tensor, head_dim] in the problem's dtype. Neighbours go together. Returns when they are in
  /// place.
  void place_rows(Tensor tensor, std::int64_t batch, std::span<const std::int64_t> numbers, const std::byte* rows);

  /// Where rows of an input or of O lie, in backend memory, and how many do so one after the other.
  struct RowPlace {
    std::byte* address = nullptr;
    std::int64_t rows = 0;    ///< from this one on that lie next to each other
    std::int64_t stride = 1;  ///< of their global numbers
  };
  /// Of the row with this global number, which is this rank's; for who makes the rows of Q, K and V instead of reading them.
  RowPlace input_place(Tensor tensor, std::int64_t batch, std::int64_t row) const;
  /// Where the owner of extra keys keeps those of a batch entry, [extra_keys, kv_heads, head_dim].
  std::byte* extra_place(Tensor tensor, std::int64_t batch) const;
  /// Whether this rank owns extra keys.
  bool owns_extra_keys() const { return extra_.bytes() > 0; }
  /// Of its row of O.
  RowPlace output_place(std::int64_t batch, std::int64_t row) const;

  /// Lets a device load the code that the steps will need, by a small part of their work whose result begin() wipes out: the first run's
  /// times are then of the work, and no code is loaded while transfers are open. Between load() and begin(); waits for the queue.
  void warm_up();

  /// Begins an attention and forgets earlier timings. `alone`: until its finish nobody else enqueues work on the queue.
  void begin(bool alone);
  /// One op of the plan; between begin() and its finish, all of them in their order. Those that move blocks may be left out together: the
  /// work then runs on what the slots hold.
  void execute(const Op& op);

  const RingPlan& plan() const { return plan_; }
  std::int64_t steps() const { return static_cast<std::int64_t>(plan_.steps.size()); }

  /// Times and bytes of the steps since begin(); waits for the queue.
  std::vector<StepTiming> timings();
  /// Returns when everything enqueued is done.
  void drain();
  /// Milliseconds from begin() to the last op's end on the queue; waits for it.
  double total_ms() { return ms_since_begin_of(*this); }
  /// Of them, those of the backward pass; 0 without gradients.
  double backward_ms();
  /// The same from the begin() of another executor on the same queue.
  double ms_since_begin_of(const RingExecutor& other);
  /// As PlannedAttention's: around one attention.
  bool count_cycles() { return attention_->count_cycles(queue_); }
  double possible_flops() { return attention_->possible_flops(queue_); }
  /// Fails unless the bytes that arrived since begin() are the plan's.
  void check_traffic();

  /// Local rows [first, first+count) of one batch entry of O, [count, heads, head_dim] in the problem's dtype, to host memory.
  void read_output(std::int64_t batch, std::int64_t first, std::int64_t count, void* rows);
  /// Rows of O as place_rows() takes rows of Q.
  void fetch_output(std::int64_t batch, std::span<const std::int64_t> numbers, std::byte* rows);
  /// The same of dQ, dK or dV, that of `tensor`, [count, heads of the tensor, head_dim]; of a plan with gradients.
  void read_gradient(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, void* rows);
  /// Local rows of LSE, [heads, count].
  void read_lse(std::int64_t batch, std::int64_t first, std::int64_t count, float* lse);

 private:
  struct StepEvents {
    std::shared_ptr<Event> wait_begin, wait_end, work_begin, work_end;
  };

  /// The queue's present moment.
  std::shared_ptr<Event> mark();
  void pack(std::int64_t step);
  void post(std::int64_t step);
  /// Gives the transport the steps that are ready.
  void post_ready();
  void wait(std::int64_t step);
  /// Attends, or in the backward pass differentiates.
  void work(std::int64_t step);
  void finish();
  void finish_gradients();

  std::shared_ptr<const RingPlan> owned_plan_;
  const RingPlan& plan_;
  Device& device_;
  Transport& transport_;
  Queue& queue_;
  Watchdog& watchdog_;
  Buffer q_;
  Buffer resident_;  ///< BufferId::resident
  Buffer extra_;     ///< BufferId::extra
  Buffer out_;
  Buffer lse_;
  Buffer dout_;
  Buffer dq_;
  Buffer dkv_;                 ///< laid out as resident
  Buffer own_gradient_;        ///< BufferId::own_gradient
  std::vector<Buffer> slots_;  ///< by number
  std::vector<Buffer> sends_;
  std::vector<LoweredTransfers> transfers_;  ///< by step
  std::unique_ptr<PlannedAttention> attention_;
  std::vector<StepEvents> events_;
  std::shared_ptr<Event> begin_event_;
  std::shared_ptr<Event> first_post_event_;  ///< when step 1 was posted; the origin of the transports' timelines
  std::shared_ptr<Event> backward_event_;    ///< when the forward pass was over
  std::shared_ptr<Event> end_event_;
  std::vector<std::int64_t> to_post_;  ///< steps that are ready, ascending
  std::shared_ptr<Event> last_mark_;   ///< null where work may have been enqueued since it
  bool alone_ = false;
};

/// Runs the executors of this process in lockstep (one of them, or all virtual ranks): the ops of one turn for all of them,
/// then those of the next. Returns once everything is enqueued; on the host, done. Without `pass_blocks` nothing is sent and the work
/// runs on what the slots hold.
void run_lockstep(std::span<const std::unique_ptr<RingExecutor>> executors, bool pass_blocks);

}  // namespace annulus
