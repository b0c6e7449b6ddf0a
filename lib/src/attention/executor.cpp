// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/executor.hpp>

#include <annulus/core/error.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <string>

namespace annulus {

namespace {

/// Host memory that input rows pass through on their way to a device.
constexpr std::int64_t kStagingBytes = std::int64_t{8} << 20;

/// A stretch of the host's time, by name, for profilers.
class ProfilerRange {
 public:
  ProfilerRange(Backend& backend, const std::string& name) : backend_(backend) { backend_.push_range(name.c_str()); }
  ~ProfilerRange() { backend_.pop_range(); }
  ProfilerRange(const ProfilerRange&) = delete;
  ProfilerRange& operator=(const ProfilerRange&) = delete;

 private:
  Backend& backend_;
};

kernels::Combine combine_of(Mixing mixing) {
  switch (mixing) {
    case Mixing::mean:
      return kernels::Combine::mean;
    case Mixing::sum:
      return kernels::Combine::sum;
    case Mixing::lse:
      break;
  }
  return kernels::Combine::lse;
}

}  // namespace

RingExecutor::RingExecutor(RingPlan plan, Backend& backend, Transport& transport, Queue& queue, Watchdog& watchdog)
    : plan_(std::move(plan)), backend_(backend), transport_(transport), queue_(queue), watchdog_(watchdog) {
  ANNULUS_EXPECTS(transport.rank() == plan_.rank && transport.ranks() == plan_.ranks,
                  "the transport is of rank {} of {}, the plan of {} of {}", transport.rank(), transport.ranks(), plan_.rank, plan_.ranks);
  const Problem& problem = plan_.problem;
  const std::int64_t rows = problem.batch * plan_.local_rows;
  const std::int64_t q_elements = rows * problem.heads * problem.head_dim;
  const std::int64_t stats = rows * problem.heads;
  const std::int64_t accumulator = backend.accumulator_bytes();
  q_ = backend.allocate(q_elements * size_of(problem.dtype), MemoryUse::tensor);
  // Dense patterns are sent from here in place. A CUDA-aware MPI maps what it is given into the receiving process, which the memory of a
  // pool does not allow.
  const MemoryUse of_resident = transport.kind() == TransportKind::mpi ? MemoryUse::slot : MemoryUse::tensor;
  resident_ = backend.allocate(buffer_bytes(plan_, BufferId::resident), of_resident);
  out_ = backend.allocate(q_elements * size_of(problem.dtype), MemoryUse::tensor);
  lse_ = backend.allocate(stats * static_cast<std::int64_t>(sizeof(float)), MemoryUse::tensor);
  for (std::int64_t index = 0; index < partial_count(plan_.pattern); ++index) {
    Buffer& acc = partial_memory_.emplace_back(backend.allocate(q_elements * accumulator, MemoryUse::tensor));
    kernels::PartialPointers partial;
    partial.acc = acc.get();
    partial.max = partial_memory_.emplace_back(backend.allocate(stats * accumulator, MemoryUse::tensor)).get();
    partial.sum = partial_memory_.emplace_back(backend.allocate(stats * accumulator, MemoryUse::tensor)).get();
    partials_.push_back(partial);
  }
  for (std::size_t parity = 0; parity < 2; ++parity) {
    slots_[parity] = backend.allocate(plan_.slot_bytes[parity], MemoryUse::slot);
    sends_[parity] = backend.allocate(plan_.send_bytes[parity], MemoryUse::slot);
  }
  build_tasks();
}

std::byte* RingExecutor::address(BufferId buffer) const {
  switch (buffer) {
    case BufferId::slot_0:
      return slots_[0].get();
    case BufferId::slot_1:
      return slots_[1].get();
    case BufferId::send_0:
      return sends_[0].get();
    case BufferId::send_1:
      return sends_[1].get();
    case BufferId::resident:
      break;
  }
  return resident_.get();
}

void RingExecutor::build_tasks() {
  for (const Step& step : plan_.steps) {
    auto& attend = attend_.emplace_back();
    for (const WorkItem& item : step.work) { attend.push_back(attend_task(item)); }
    auto& pack = pack_.emplace_back();
    for (const PackItem& item : step.packs) {
      for (const kernels::PackTask& task : pack_tasks(item)) { pack.push_back(task); }
    }
    auto& outgoing = outgoing_.emplace_back();
    for (const Message& message : step.sends) {
      outgoing.push_back({message.peer, address(message.buffer) + message.offset_bytes, message.bytes});
    }
    auto& incoming = incoming_.emplace_back();
    for (const Message& message : step.receives) {
      incoming.push_back({message.peer, address(message.buffer) + message.offset_bytes, message.bytes});
    }
  }
  const Problem& problem = plan_.problem;
  finish_.dtype = problem.dtype;
  finish_.combine = combine_of(plan_.pattern.mixing);
  finish_.batch = problem.batch;
  finish_.rows = plan_.local_rows;
  finish_.heads = problem.heads;
  finish_.head_dim = problem.head_dim;
  finish_.output_scale = plan_.pattern.scale_by_branches ? 1.0 / static_cast<double>(plan_.pattern.branches.size()) : 1.0;
  finish_.partials = checked_narrow<int>(static_cast<std::int64_t>(partials_.size()));
  std::copy(partials_.begin(), partials_.end(), finish_.partial);
  finish_.out = out_.get();
  finish_.lse = reinterpret_cast<float*>(lse_.get());
}

kernels::AttendTask RingExecutor::attend_task(const WorkItem& item) const {
  const Problem& problem = plan_.problem;
  const std::int64_t rows = plan_.local_rows;
  const std::int64_t q_pitch = problem.heads * problem.head_dim;
  const std::int64_t group_stride = item.heads.kv.stride * problem.group_size();
  const std::int64_t element = size_of(problem.dtype);
  const std::int64_t accumulator = backend_.accumulator_bytes();

  kernels::AttendTask task;
  task.dtype = problem.dtype;
  task.mask = item.mask;
  task.batch = problem.batch;
  task.segments = item.segments;
  task.q_rows = item.q_local.count;
  task.k_rows = item.k_stored.count;
  task.kv_heads = item.heads.kv.count;
  task.q_per_kv = item.heads.q_per_kv;
  task.head_dim = problem.head_dim;
  task.scale = problem.scale;

  const std::int64_t q_start = item.q_local.first * q_pitch + item.heads.q_first * problem.head_dim;
  task.q = q_.get() + q_start * element;
  task.q_strides = {rows * q_pitch, item.segment_stride * q_pitch, item.q_local.stride * q_pitch, group_stride * problem.head_dim,
                    problem.head_dim};
  const kernels::PartialPointers& partial = partials_[partials_.size() == 1 ? 0 : static_cast<std::size_t>(item.branch)];
  task.acc = static_cast<std::byte*>(partial.acc) + q_start * accumulator;
  task.acc_strides = task.q_strides;
  const std::int64_t stat_start = item.heads.q_first * rows + item.q_local.first;
  task.max = static_cast<std::byte*>(partial.max) + stat_start * accumulator;
  task.sum = static_cast<std::byte*>(partial.sum) + stat_start * accumulator;
  task.stat_strides = {problem.heads * rows, item.segment_stride, item.q_local.stride, group_stride * rows, rows};

  // Keys: rows of the resident shard, or of a block that holds the class's heads next to each other.
  const bool resident = item.keys.block < 0;
  const KvBlock* block = resident ? nullptr : &plan_.blocks[static_cast<std::size_t>(item.keys.block)];
  const std::int64_t stored_rows = resident ? rows : block->rows_global.count;
  const Progression stored_heads = resident ? range(0, problem.kv_heads) : block->kv_heads;
  const Progression heads = indices_of(item.heads.kv, stored_heads);
  const std::int64_t k_pitch = stored_heads.count * problem.head_dim;
  const std::byte* base = address(item.keys.buffer) + item.keys.offset_bytes;
  const std::int64_t k_start = item.k_stored.first * k_pitch + heads.first * problem.head_dim;
  task.k = base + k_start * element;
  task.v = base + (problem.batch * stored_rows * k_pitch + k_start) * element;
  task.kv_strides = {stored_rows * k_pitch, item.segment_stride * k_pitch, item.k_stored.stride * k_pitch, heads.stride * problem.head_dim,
                     0};
  task.q_positions = {item.q_global.first, item.q_global.stride};
  task.k_positions = {item.k_global.first, item.k_global.stride};
  return task;
}

std::vector<kernels::PackTask> RingExecutor::pack_tasks(const PackItem& item) const {
  const Problem& problem = plan_.problem;
  const KvBlock& block = plan_.blocks[static_cast<std::size_t>(item.block)];
  const std::int64_t element = size_of(problem.dtype);
  const std::int64_t tensor_bytes = block_elements(problem, block) * element;
  std::byte* target = address(item.to) + item.to_offset_bytes;
  const std::byte* source = address(item.from) + item.from_offset_bytes;
  kernels::PackTask task;
  task.element_size = element;
  task.batch = problem.batch;
  task.rows = block.rows_global.count;
  task.heads = block.kv_heads.count;
  task.head_dim = problem.head_dim;
  std::vector<kernels::PackTask> tasks;
  for (std::int64_t tensor = 0; tensor < 2; ++tensor) {  // K, then V
    task.dst = target + tensor * tensor_bytes;
    if (item.from == BufferId::resident) {
      const std::int64_t pitch = problem.kv_heads * problem.head_dim;
      Progression local;
      for (const ShardPiece& piece : plan_.shard.pieces) {
        if (!piece.global.contains(block.rows_global.first)) { continue; }
        local = indices_of(block.rows_global, piece.global);
        local.first += piece.local_first;
      }
      const std::int64_t start = local.first * pitch + block.kv_heads.first * problem.head_dim;
      task.src = source + (tensor * problem.batch * plan_.local_rows * pitch + start) * element;
      task.src_batch_stride = plan_.local_rows * pitch;
      task.src_row_stride = local.stride * pitch;
      task.src_head_stride = block.kv_heads.stride * problem.head_dim;
    } else {
      task.src = source + tensor * tensor_bytes;
      task.src_head_stride = problem.head_dim;
      task.src_row_stride = block.kv_heads.count * problem.head_dim;
      task.src_batch_stride = block.rows_global.count * task.src_row_stride;
    }
    tasks.push_back(task);
  }
  return tasks;
}

void RingExecutor::load(const TensorSource& source) {
  for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) { load(source, tensor); }
}

void RingExecutor::load(const TensorSource& source, Tensor tensor) {
  for (std::int64_t batch = 0; batch < plan_.problem.batch; ++batch) {
    for (const ShardPiece& piece : plan_.shard.pieces) {
      ANNULUS_ASSERT(piece.global.stride == 1, "reading rows {} apart", piece.global.stride);
      load_rows(source, tensor, batch, piece.global.first, piece.global.count);
    }
  }
}

void RingExecutor::load_rows(const TensorSource& source, Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count) {
  const Problem& problem = plan_.problem;
  const std::int64_t row_bytes = (tensor == Tensor::q ? problem.heads : problem.kv_heads) * problem.head_dim * size_of(problem.dtype);
  std::byte* target = tensor == Tensor::q ? q_.get() : resident_.get() + (tensor == Tensor::k ? 0 : resident_.bytes() / 2);
  const auto owner = std::find_if(plan_.shard.pieces.begin(), plan_.shard.pieces.end(),
                                  [&](const ShardPiece& piece) { return piece.global.contains(first); });
  if (count == 0) { return; }
  ANNULUS_ASSERT(owner != plan_.shard.pieces.end(), "row {} is not of this rank", first);
  const std::int64_t local = owner->local_first + first - owner->global.first;
  target += (batch * plan_.local_rows + local) * row_bytes;
  const std::int64_t staged_rows = std::max<std::int64_t>(1, kStagingBytes / row_bytes);
  const auto bands = source.bands(tensor);
  std::vector<std::byte> staging(backend_.host_memory() ? 0 : static_cast<std::size_t>(std::min(staged_rows, count) * row_bytes));
  for (std::int64_t done = 0, part = 0; done < count; done += part) {
    part = std::min(staged_rows, count - done);
    if (backend_.host_memory()) {
      // A whole band at a time is read to its place without a copy.
      if (bands) { part = std::min(count - done, bands->rows - (first + done) % bands->rows); }
      source.read(tensor, batch, first + done, part, problem.dtype, target + done * row_bytes);
    } else {
      source.read(tensor, batch, first + done, part, problem.dtype, staging.data());
      backend_.upload(queue_, target + done * row_bytes, staging.data(), part * row_bytes);
      queue_.synchronize();
    }
    watchdog_.progress();
  }
}

void RingExecutor::warm_up() {
  if (backend_.host_memory()) { return; }
  // Enough for a whole tile of every kind; more of it would only take time.
  constexpr std::int64_t kRows = 4096;
  constexpr std::int64_t kSegments = 16;
  constexpr std::size_t kTasks = 8;
  constexpr std::size_t kSteps = 2;  // of resident keys, and of keys that came; later steps are like the second
  const ProfilerRange range(backend_, "annulus: warm up");
  begin();
  for (std::size_t step = 0; step < std::min(kSteps, attend_.size()); ++step) {
    std::vector<kernels::AttendTask> part = attend_[step];
    part.resize(std::min(part.size(), kTasks));
    for (kernels::AttendTask& task : part) {
      task.segments = std::min(task.segments, kSegments);
      task.q_rows = std::min(task.q_rows, kRows);
      task.k_rows = std::min(task.k_rows, kRows);
    }
    if (!part.empty()) { backend_.attend(queue_, part); }
  }
  finish();
  queue_.synchronize();
}

void RingExecutor::begin() {
  const ProfilerRange range(backend_, "annulus: begin");
  events_.assign(plan_.steps.size(), {});
  begin_event_ = backend_.record(queue_);
  first_post_event_ = begin_event_;
  const Problem& problem = plan_.problem;
  const std::int64_t stats = problem.batch * plan_.local_rows * problem.heads;
  if (stats == 0) { return; }
  for (const kernels::PartialPointers& partial : partials_) { backend_.fill_identity(queue_, partial, stats, problem.head_dim); }
}

void RingExecutor::post(std::int64_t step) {
  if (step >= steps()) { return; }
  const auto index = static_cast<std::size_t>(step);
  const ProfilerRange range(backend_, fmt::format("annulus: post step {}", step));
  if (!pack_[index].empty()) { backend_.pack(queue_, pack_[index]); }
  if (step == 1) { first_post_event_ = backend_.record(queue_); }
  transport_.post(step, outgoing_[index], incoming_[index], queue_);
}

void RingExecutor::wait(std::int64_t step) {
  if (step >= steps()) { return; }
  watchdog_.set_step(step);
  const ProfilerRange range(backend_, fmt::format("annulus: wait for step {}", step));
  StepEvents& events = events_[static_cast<std::size_t>(step)];
  events.wait_begin = backend_.record(queue_);
  transport_.wait(step, queue_);
  events.wait_end = backend_.record(queue_);
}

void RingExecutor::work(std::int64_t step) {
  if (step >= steps()) { return; }
  const ProfilerRange range(backend_, fmt::format("annulus: work of step {}", step));
  StepEvents& events = events_[static_cast<std::size_t>(step)];
  watchdog_.set_step(step);
  events.work_begin = backend_.record(queue_);
  if (!attend_[static_cast<std::size_t>(step)].empty()) { backend_.attend(queue_, attend_[static_cast<std::size_t>(step)]); }
  events.work_end = backend_.record(queue_);
  watchdog_.progress();
}

void RingExecutor::finish() {
  const ProfilerRange range(backend_, "annulus: finish");
  if (finish_.batch * finish_.rows > 0) { backend_.finish(queue_, finish_); }
  end_event_ = backend_.record(queue_);
  watchdog_.set_step(-1);
}

std::vector<StepTiming> RingExecutor::timings() {
  queue_.synchronize();
  std::vector<StepTiming> timings(plan_.steps.size());
  for (std::size_t step = 0; step < timings.size(); ++step) {
    const StepEvents& events = events_[step];
    StepTiming& timing = timings[step];
    timing.compute_ms = events.work_end->ms_since(*events.work_begin);
    if (!attend_[step].empty()) {
      timing.work_begin_ms = events.work_begin->ms_since(*first_post_event_);
      timing.work_end_ms = events.work_end->ms_since(*first_post_event_);
    }
    if (!events.wait_end) { continue; }  // step 0, or a run that passes nothing
    timing.exposed_ms = events.wait_end->ms_since(*events.wait_begin);
    const StepTraffic traffic = transport_.traffic(static_cast<std::int64_t>(step));
    timing.communication_ms = traffic.communication_ms;
    timing.bytes_sent = traffic.bytes_sent;
    timing.bytes_received = traffic.bytes_received;
    if (traffic.end_ms > 0) {
      timing.transfer_begin_ms = traffic.begin_ms;
      timing.transfer_end_ms = traffic.end_ms;
    }
  }
  return timings;
}

void RingExecutor::connect() {
  std::vector<StepMessages> messages;
  for (std::size_t step = 0; step < outgoing_.size(); ++step) { messages.push_back({outgoing_[step], incoming_[step]}); }
  transport_.prepare(messages);
}

void RingExecutor::drain() {
  // The transport waits for its last step under the watchdog's eye; what then remains on the queue is this rank's own work.
  const bool passed_blocks = steps() > 1 && events_.back().wait_end != nullptr;
  if (passed_blocks) { transport_.traffic(steps() - 1); }
  queue_.synchronize();
}

double RingExecutor::ms_since_begin_of(const RingExecutor& other) {
  queue_.synchronize();
  return end_event_->ms_since(*other.begin_event_);
}

void RingExecutor::check_traffic() {
  for (std::int64_t step = 1; step < steps(); ++step) {
    std::int64_t expected = 0;
    for (const Incoming& message : incoming_[static_cast<std::size_t>(step)]) { expected += message.bytes; }
    const std::int64_t arrived = transport_.traffic(step).bytes_received;
    ANNULUS_ASSERT(arrived == expected, "step {}: {} bytes arrived and the plan says {}", step, arrived, expected);
  }
}

void RingExecutor::read_output(std::int64_t batch, std::int64_t first, std::int64_t count, void* rows) {
  const std::int64_t row_bytes = plan_.problem.heads * plan_.problem.head_dim * size_of(plan_.problem.dtype);
  backend_.download(queue_, rows, out_.get() + (batch * plan_.local_rows + first) * row_bytes, count * row_bytes);
  queue_.synchronize();
}

void RingExecutor::read_lse(std::int64_t batch, std::int64_t first, std::int64_t count, float* lse) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(float));
  for (std::int64_t head = 0; head < plan_.problem.heads; ++head) {
    const std::int64_t start = (batch * plan_.problem.heads + head) * plan_.local_rows + first;
    backend_.download(queue_, lse + head * count, lse_.get() + start * kBytes, count * kBytes);
  }
  queue_.synchronize();
}

void run_lockstep(std::span<const std::unique_ptr<RingExecutor>> executors, bool pass_blocks) {
  std::int64_t steps = 0;
  for (const auto& executor : executors) {
    steps = std::max(steps, executor->steps());
    executor->begin();
  }
  const auto post_all = [&](std::int64_t step) {
    if (!pass_blocks) { return; }
    for (const auto& executor : executors) { executor->post(step); }
  };
  post_all(1);
  for (const auto& executor : executors) { executor->work(0); }
  for (std::int64_t step = 1; step < steps; ++step) {
    if (pass_blocks) {
      for (const auto& executor : executors) { executor->wait(step); }
    }
    post_all(step + 1);
    for (const auto& executor : executors) { executor->work(step); }
  }
  for (const auto& executor : executors) { executor->finish(); }
}

}  // namespace annulus
