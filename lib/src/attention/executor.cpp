// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/executor.hpp>

#include <annulus/core/error.hpp>

#include "gpu/profiler_range.hpp"
#include "staged_rows.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

namespace annulus {

RingExecutor::RingExecutor(std::shared_ptr<const RingPlan> plan, AttentionKernel& kernel, Device& device, Transport& transport,
                           Queue& queue, Watchdog& watchdog)
    : owned_plan_(std::move(plan)), plan_(*owned_plan_), device_(device), transport_(transport), queue_(queue), watchdog_(watchdog) {
  ANNULUS_EXPECTS(transport.rank() == plan_.rank && transport.ranks() == plan_.ranks,
                  "the transport is of rank {} of {}, the plan of {} of {}", transport.rank(), transport.ranks(), plan_.rank, plan_.ranks);
  const Problem& problem = plan_.problem;
  const std::int64_t rows = problem.batch * plan_.local_rows;
  const std::int64_t q_elements = rows * problem.heads * problem.head_dim;
  const std::int64_t stats = rows * problem.heads;
  q_ = device.allocate(q_elements * size_of(problem.dtype), MemoryUse::tensor);
  // Dense patterns are sent from here in place. A CUDA-aware MPI maps what it is given into the receiving process, which the memory of a
  // pool does not allow.
  const MemoryUse of_resident = transport.kind() == TransportKind::mpi ? MemoryUse::slot : MemoryUse::tensor;
  resident_ = device.allocate(buffer_bytes(plan_, BufferId::resident), of_resident);
  out_ = device.allocate(q_elements * size_of(problem.dtype), MemoryUse::tensor);
  lse_ = device.allocate(stats * static_cast<std::int64_t>(sizeof(float)), MemoryUse::tensor);
  TensorAddresses addresses;
  for (std::size_t number = 0; number < kSlots.size(); ++number) {
    addresses.slots[number] = slots_.emplace_back(device.allocate(plan_.slot_bytes[number], MemoryUse::slot)).get();
  }
  for (std::size_t number = 0; number < kSendBuffers.size(); ++number) {
    addresses.sends[number] = sends_.emplace_back(device.allocate(plan_.send_bytes[number], MemoryUse::slot)).get();
  }
  if (plan_.routing.gradients) {
    dout_ = device.allocate(q_.bytes(), MemoryUse::tensor);
    dq_ = device.allocate(q_.bytes(), MemoryUse::tensor);
    dkv_ = device.allocate(buffer_bytes(plan_, BufferId::resident), MemoryUse::tensor);
    own_gradient_ = device.allocate(buffer_bytes(plan_, BufferId::own_gradient), MemoryUse::tensor);
  }
  addresses.dout = dout_.get();
  addresses.dq = dq_.get();
  addresses.dkv = dkv_.get();
  addresses.own_gradient = own_gradient_.get();
  addresses.q = q_.get();
  extra_ = device.allocate(buffer_bytes(plan_, BufferId::extra), of_resident);
  addresses.resident = resident_.get();
  addresses.extra = extra_.get();
  addresses.out = out_.get();
  addresses.lse = reinterpret_cast<float*>(lse_.get());
  transfers_ = lower_transfers(plan_, addresses);
  attention_ = kernel.prepare(plan_, addresses);
}

void RingExecutor::load(const TensorSource& source) {
  for (const Tensor tensor : kSequenceTensors) { load(source, tensor); }
  if (plan_.routing.gradients) { load(source, Tensor::dout); }
  load_extra_keys(source);
}

void RingExecutor::load_extra_keys(const TensorSource& source) {
  if (extra_.bytes() == 0) { return; }
  const Problem& problem = plan_.problem;
  for (const Tensor tensor : kExtraTensors) {
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      read_staged(
          device_, queue_, watchdog_, extra_place(tensor, batch), problem.extra_keys, row_bytes(problem, tensor),
          [&](std::int64_t done, std::int64_t rows, std::byte* out) { source.read(tensor, batch, done, rows, problem.dtype, out); },
          [](std::int64_t /*done*/, std::int64_t most) { return most; });
    }
  }
}

std::byte* RingExecutor::extra_place(Tensor tensor, std::int64_t batch) const {
  ANNULUS_ASSERT(extra_.bytes() > 0, "rank {} keeps no extra keys", plan_.rank);
  const Problem& problem = plan_.problem;
  const std::int64_t entries_before = (tensor == Tensor::k_extra ? 0 : problem.batch) + batch;
  return extra_.get() + entries_before * problem.extra_keys * row_bytes(problem, tensor);
}

void RingExecutor::load(const TensorSource& source, Tensor tensor) {
  for (std::int64_t batch = 0; batch < plan_.problem.batch; ++batch) {
    for (const ShardPiece& piece : plan_.shard.pieces) {
      if (piece.global.stride == 1) {
        load_rows(source, tensor, batch, piece.global.first, piece.global.count);
        continue;
      }
      for (std::int64_t row = 0; row < piece.global.count; ++row) { load_rows(source, tensor, batch, piece.global[row], 1); }
    }
  }
}

RingExecutor::RowPlace RingExecutor::input_place(Tensor tensor, std::int64_t batch, std::int64_t row) const {
  const Problem& problem = plan_.problem;
  const auto owner = std::find_if(plan_.shard.pieces.begin(), plan_.shard.pieces.end(),
                                  [&](const ShardPiece& piece) { return piece.global.contains(row); });
  ANNULUS_ASSERT(owner != plan_.shard.pieces.end(), "row {} is not of this rank", row);
  const std::int64_t in_piece = (row - owner->global.first) / owner->global.stride;
  const std::int64_t left = owner->global.count - in_piece;
  const std::int64_t bytes = row_bytes(problem, tensor);
  if (tensor == Tensor::q || tensor == Tensor::dout) {
    const Buffer& queries = tensor == Tensor::q ? q_ : dout_;
    return {queries.get() + (batch * plan_.local_rows + owner->local_first + in_piece) * bytes, left, owner->global.stride};
  }
  const std::int64_t rows_before = ((tensor == Tensor::k ? 0 : problem.batch) + batch) * owner->global.count + in_piece;
  return {resident_.get() + resident_offset(problem, *owner) + rows_before * bytes, left, owner->global.stride};
}

RingExecutor::RowPlace RingExecutor::output_place(std::int64_t batch, std::int64_t row) const {
  const RowPlace query = input_place(Tensor::q, batch, row);  // O lies as Q does
  return {out_.get() + (query.address - q_.get()), query.rows, query.stride};
}

void RingExecutor::load_rows(const TensorSource& source, Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count) {
  if (count == 0) { return; }
  const Problem& problem = plan_.problem;
  const std::int64_t bytes = row_bytes(problem, tensor);
  std::byte* target = input_place(tensor, batch, first).address;
  const auto bands = source.bands(tensor);
  // A whole band at a time is read to its place without a copy.
  const auto together = [&](std::int64_t done, std::int64_t most) {
    if (!bands) { return most; }
    const RowBands::Band band = bands->band_at(first + done);
    return band.first + band.count - first - done;
  };
  read_staged(
      device_, queue_, watchdog_, target, count, bytes,
      [&](std::int64_t done, std::int64_t rows, std::byte* out) { source.read(tensor, batch, first + done, rows, problem.dtype, out); },
      together);
}

namespace {

/// How many of `numbers` from the place `begin` on, at most `most`, are `stride` apart, and so lie next to each other.
std::int64_t neighbours(std::span<const std::int64_t> numbers, std::size_t begin, std::int64_t most, std::int64_t stride) {
  std::size_t end = begin + 1;
  while (end < numbers.size() && static_cast<std::int64_t>(end - begin) < most && numbers[end] == numbers[end - 1] + stride) { ++end; }
  return static_cast<std::int64_t>(end - begin);
}

}  // namespace

void RingExecutor::place_rows(Tensor tensor, std::int64_t batch, std::span<const std::int64_t> numbers, const std::byte* rows) {
  const std::int64_t bytes = row_bytes(plan_.problem, tensor);
  std::int64_t count = 0;
  for (std::size_t at = 0; at < numbers.size(); at += static_cast<std::size_t>(count)) {
    const RowPlace place = input_place(tensor, batch, numbers[at]);
    count = neighbours(numbers, at, place.rows, place.stride);
    device_.upload(queue_, place.address, rows, count * bytes);
    rows += count * bytes;
  }
  queue_.synchronize();
  watchdog_.progress();
}

void RingExecutor::warm_up() {
  if (device_.host_memory()) { return; }
  const ProfilerRange range("annulus: warm up");
  attention_->warm_up(queue_);
  queue_.synchronize();
}

void RingExecutor::begin(bool alone) {
  const ProfilerRange range("annulus: begin");
  alone_ = alone && !device_.host_memory();  // where posting takes the queue's time
  events_.assign(plan_.steps.size(), {});
  begin_event_ = device_.record(queue_);
  first_post_event_ = begin_event_;
  last_mark_ = nullptr;
  attention_->begin(queue_);
}

std::shared_ptr<Event> RingExecutor::mark() {
  if (!alone_ || last_mark_ == nullptr) { last_mark_ = device_.record(queue_); }
  return last_mark_;
}

void RingExecutor::execute(const Op& op) {
  switch (op.kind) {
    case OpKind::pack:
      return pack(op.step);
    case OpKind::post:
      return post(op.step);
    case OpKind::wait:
      return wait(op.step);
    case OpKind::attend:
    case OpKind::differentiate:
      return work(op.step);
    case OpKind::accumulate:
      last_mark_ = nullptr;
      return attention_->accumulate(queue_, op.step);
    case OpKind::finish_gradients:
      return finish_gradients();
    case OpKind::finish:
      break;
  }
  finish();
}

void RingExecutor::pack(std::int64_t step) {
  const ProfilerRange range(fmt::format("annulus: pack for step {}", step).c_str());
  const LoweredTransfers& what = transfers_[static_cast<std::size_t>(step)];
  if (what.pack.empty()) { return; }
  device_.pack(queue_, what.pack);
  last_mark_ = nullptr;
}

void RingExecutor::post(std::int64_t step) {
  const ProfilerRange range(fmt::format("annulus: post step {}", step).c_str());
  if (step == 1) { first_post_event_ = mark(); }
  transport_.ready(step, queue_);
  to_post_.push_back(step);
  // A device is given the work beside the messages first, so that it need not wait for the host.
  if (device_.host_memory() || transport_.takes_multiprocessors()) { post_ready(); }
}

void RingExecutor::post_ready() {
  for (const std::int64_t step : to_post_) {
    const LoweredTransfers& what = transfers_[static_cast<std::size_t>(step)];
    transport_.post(step, what.outgoing, what.incoming);
  }
  to_post_.clear();
}

void RingExecutor::wait(std::int64_t step) {
  watchdog_.set_step(step);
  const ProfilerRange range(fmt::format("annulus: wait for step {}", step).c_str());
  StepEvents& events = events_[static_cast<std::size_t>(step)];
  events.wait_begin = mark();
  transport_.wait(step, queue_);
  last_mark_ = nullptr;
  events.wait_end = mark();
}

void RingExecutor::work(std::int64_t step) {
  const ProfilerRange range(fmt::format("annulus: work of step {}", step).c_str());
  StepEvents& events = events_[static_cast<std::size_t>(step)];
  watchdog_.set_step(step);
  events.work_begin = mark();
  if (step < plan_.forward_steps) {
    attention_->attend(queue_, step);
  } else {
    attention_->differentiate(queue_, step);
  }
  last_mark_ = nullptr;
  events.work_end = mark();
  post_ready();
  watchdog_.progress();
}

void RingExecutor::finish() {
  const ProfilerRange range("annulus: finish");
  attention_->finish(queue_);
  end_event_ = device_.record(queue_);
  if (plan_.routing.gradients) {
    backward_event_ = end_event_;
    last_mark_ = nullptr;
    attention_->begin_gradients(queue_);
    return;
  }
  watchdog_.set_step(-1);
}

void RingExecutor::finish_gradients() {
  const ProfilerRange range("annulus: finish gradients");
  attention_->finish_gradients(queue_);
  end_event_ = device_.record(queue_);
  watchdog_.set_step(-1);
}

double RingExecutor::backward_ms() {
  if (!plan_.routing.gradients) { return 0; }
  queue_.synchronize();
  return end_event_->ms_since(*backward_event_);
}

std::vector<StepTiming> RingExecutor::timings() {
  queue_.synchronize();
  std::vector<StepTiming> timings(plan_.steps.size());
  for (std::size_t step = 0; step < timings.size(); ++step) {
    const StepEvents& events = events_[step];
    StepTiming& timing = timings[step];
    timing.compute_ms = events.work_end->ms_since(*events.work_begin);
    if (!plan_.steps[step].work.empty()) {
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
  for (const LoweredTransfers& step : transfers_) { messages.push_back({step.outgoing, step.incoming}); }
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
    for (const Incoming& message : transfers_[static_cast<std::size_t>(step)].incoming) { expected += message.bytes; }
    const std::int64_t arrived = transport_.traffic(step).bytes_received;
    ANNULUS_ASSERT(arrived == expected, "step {}: {} bytes arrived and the plan says {}", step, arrived, expected);
  }
}

void RingExecutor::read_output(std::int64_t batch, std::int64_t first, std::int64_t count, void* rows) {
  const std::int64_t bytes = row_bytes(plan_.problem, Tensor::q);
  device_.download(queue_, rows, out_.get() + (batch * plan_.local_rows + first) * bytes, count * bytes);
  queue_.synchronize();
}

void RingExecutor::read_gradient(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, void* rows) {
  ANNULUS_EXPECTS(plan_.routing.gradients, "the plan has no gradients");
  auto* target = static_cast<std::byte*>(rows);
  const std::int64_t bytes = row_bytes(plan_.problem, tensor);
  for (std::int64_t done = 0, part = 0; done < count; done += part) {
    const ShardPiece& piece = piece_at(plan_.shard, first + done);
    const std::int64_t in_piece = first + done - piece.local_first;
    part = std::min(count - done, piece.global.count - in_piece);
    const RowPlace place = input_place(tensor, batch, piece.global[in_piece]);  // gradients lie as what they are of
    const std::byte* const from =
        tensor == Tensor::q ? dq_.get() + (place.address - q_.get()) : dkv_.get() + (place.address - resident_.get());
    device_.download(queue_, target + done * bytes, from, part * bytes);
  }
  queue_.synchronize();
}

void RingExecutor::fetch_output(std::int64_t batch, std::span<const std::int64_t> numbers, std::byte* rows) {
  const std::int64_t bytes = row_bytes(plan_.problem, Tensor::q);
  std::int64_t count = 0;
  for (std::size_t at = 0; at < numbers.size(); at += static_cast<std::size_t>(count)) {
    const RowPlace place = output_place(batch, numbers[at]);
    count = neighbours(numbers, at, place.rows, place.stride);
    device_.download(queue_, rows, place.address, count * bytes);
    rows += count * bytes;
  }
  queue_.synchronize();
  watchdog_.progress();
}

void RingExecutor::read_lse(std::int64_t batch, std::int64_t first, std::int64_t count, float* lse) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(float));
  for (std::int64_t head = 0; head < plan_.problem.heads; ++head) {
    const std::int64_t start = (batch * plan_.problem.heads + head) * plan_.local_rows + first;
    device_.download(queue_, lse + head * count, lse_.get() + start * kBytes, count * kBytes);
  }
  queue_.synchronize();
}

void run_lockstep(std::span<const std::unique_ptr<RingExecutor>> executors, bool pass_blocks) {
  const auto runs = [&](const Op& op) {
    const bool moves = op.kind == OpKind::pack || op.kind == OpKind::post || op.kind == OpKind::wait;
    return pass_blocks || !(moves || op.kind == OpKind::accumulate);
  };
  for (const auto& executor : executors) { executor->begin(executors.size() == 1); }
  std::vector<std::size_t> next(executors.size(), 0);
  constexpr std::int64_t kEnd = std::numeric_limits<std::int64_t>::max();
  const auto left = [&](std::size_t rank) { return next[rank] < executors[rank]->plan().ops.size(); };
  const auto turn_of = [&](std::size_t rank) { return executors[rank]->plan().ops[next[rank]].turn; };
  for (bool any = true; any;) {
    any = false;
    std::int64_t turn = kEnd;
    for (std::size_t rank = 0; rank < executors.size(); ++rank) {
      if (left(rank)) { turn = std::min(turn, turn_of(rank)); }
    }
    for (std::size_t rank = 0; rank < executors.size(); ++rank) {
      for (; left(rank) && turn_of(rank) == turn; ++next[rank]) {
        const Op& op = executors[rank]->plan().ops[next[rank]];
        if (runs(op)) { executors[rank]->execute(op); }
        any = true;
      }
    }
  }
}

}  // namespace annulus
