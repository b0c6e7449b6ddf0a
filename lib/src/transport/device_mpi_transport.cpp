// SPDX-License-Identifier: Apache-2.0
#include "device_mpi_transport.hpp"

#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus/transport/gpu_transports.hpp>

#include "device/cuda_access.hpp"
#include "job/message_chunks.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <chrono>

namespace annulus {

namespace {

using Clock = std::chrono::steady_clock;

/// Long enough for a copy engine's full rate, short enough that the first chunk is soon on its way.
constexpr std::int64_t kStagedChunkBytes = std::int64_t{4} << 20;
constexpr std::size_t kBuffersPerMessage = 2;
constexpr int kTag = 17;
/// MPI moves long messages only while somebody asks, so the thread sleeps between questions only once nothing has come for a while.
constexpr auto kEagerTime = std::chrono::milliseconds(20);
constexpr auto kNap = std::chrono::microseconds(50);

/// Between two questions: gives the core away, and sleeps if nothing has moved for long.
class Patience {
 public:
  void moved() { last_ = Clock::now(); }
  void pause() const {
    if (Clock::now() - last_ > kEagerTime) {
      std::this_thread::sleep_for(kNap);
    } else {
      std::this_thread::yield();
    }
  }

 private:
  Clock::time_point last_ = Clock::now();
};

/// Bytes that came.
/// @throws RuntimeFailure unless they are as many as were due
std::int64_t counted(const MPI_Status& status, std::int64_t expected, std::int64_t step, std::int64_t peer) {
  int count = 0;
  ANNULUS_MPI(MPI_Get_count(&status, MPI_BYTE, &count));
  if (count != expected) {
    throw RuntimeFailure(fmt::format("step {}: {} bytes came from rank {} where {} were due", step, count, peer, expected));
  }
  return count;
}

}  // namespace

PinnedBuffer::PinnedBuffer(std::size_t bytes) {
  void* data = nullptr;
  ANNULUS_CUDA(cudaHostAlloc(&data, bytes, cudaHostAllocPortable));
  data_ = static_cast<std::byte*>(data);
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr && !unwinding()) { static_cast<void>(cudaFreeHost(data_)); }
}

/// A piece of a message in one pinned buffer.
struct DeviceMpiTransport::Chunk {
  std::byte* staging = nullptr;
  cudaEvent_t copied = nullptr;  ///< the copy between device and buffer is done
  MPI_Request request = MPI_REQUEST_NULL;
  std::int64_t bytes = 0;
};

/// A message on its way out. Chunk i uses buffer i mod 2; chunks go through the stages in order.
class DeviceMpiTransport::Departure {
 public:
  Departure(const Outgoing& message, const std::array<Chunk, kBuffersPerMessage>& buffers) : message_(message), buffers_(buffers) {}

  /// Moves what can be moved; whether anything was.
  bool advance(MPI_Comm comm, cudaStream_t stream) {
    bool moved = false;
    if (sent_ < isent_) {
      Chunk& chunk = buffer(sent_);
      int done = 0;
      ANNULUS_MPI(MPI_Test(&chunk.request, &done, MPI_STATUS_IGNORE));
      sent_ += done;
      moved = done != 0;
    }
    if (isent_ < copied_) {
      Chunk& chunk = buffer(isent_);
      if (is_reached(chunk.copied)) {
        ANNULUS_MPI(MPI_Isend(chunk.staging, checked_narrow<int>(chunk.bytes), MPI_BYTE, checked_narrow<int>(message_.peer), kTag, comm,
                              &chunk.request));
        ++isent_;
        moved = true;
      }
    }
    if (offset_ < message_.bytes && copied_ - sent_ < std::ssize(buffers_)) {
      Chunk& chunk = buffer(copied_);
      chunk.bytes = std::min(kStagedChunkBytes, message_.bytes - offset_);
      ANNULUS_CUDA(
          cudaMemcpyAsync(chunk.staging, message_.data + offset_, static_cast<std::size_t>(chunk.bytes), cudaMemcpyDeviceToHost, stream));
      ANNULUS_CUDA(cudaEventRecord(chunk.copied, stream));
      offset_ += chunk.bytes;
      ++copied_;
      moved = true;
    }
    return moved;
  }
  bool leaves_nothing_to_enqueue() const { return offset_ == message_.bytes; }
  bool finished() const { return leaves_nothing_to_enqueue() && sent_ == copied_; }

 private:
  Chunk& buffer(std::int64_t chunk) { return buffers_[static_cast<std::size_t>(chunk) % kBuffersPerMessage]; }

  Outgoing message_;
  std::array<Chunk, kBuffersPerMessage> buffers_;
  std::int64_t offset_ = 0;  ///< bytes whose copy is enqueued
  std::int64_t copied_ = 0;  ///< chunks whose copy is enqueued
  std::int64_t isent_ = 0;   ///< chunks given to MPI
  std::int64_t sent_ = 0;    ///< chunks that MPI is done with
};

/// A message on its way in.
class DeviceMpiTransport::Landing {
 public:
  Landing(const Incoming& message, std::int64_t step, const std::array<Chunk, kBuffersPerMessage>& buffers)
      : message_(message), step_(step), buffers_(buffers) {}

  bool advance(const Communicator& comm, cudaStream_t stream) {
    bool moved = false;
    if (freed_ < received_) {
      if (is_reached(buffer(freed_).copied)) {
        ++freed_;
        moved = true;
      }
    }
    if (received_ < posted_) {
      Chunk& chunk = buffer(received_);
      int done = 0;
      MPI_Status status;
      ANNULUS_MPI(MPI_Test(&chunk.request, &done, &status));
      if (done != 0) {
        bytes_came_ += counted(status, chunk.bytes, step_, comm.rank_in_job(message_.peer));
        ANNULUS_CUDA(
            cudaMemcpyAsync(message_.data + landed_, chunk.staging, static_cast<std::size_t>(chunk.bytes), cudaMemcpyHostToDevice, stream));
        ANNULUS_CUDA(cudaEventRecord(chunk.copied, stream));
        landed_ += chunk.bytes;
        ++received_;
        moved = true;
      }
    }
    if (offset_ < message_.bytes && posted_ - freed_ < std::ssize(buffers_)) {
      Chunk& chunk = buffer(posted_);
      chunk.bytes = std::min(kStagedChunkBytes, message_.bytes - offset_);
      ANNULUS_MPI(MPI_Irecv(chunk.staging, checked_narrow<int>(chunk.bytes), MPI_BYTE, checked_narrow<int>(message_.peer), kTag, comm.get(),
                            &chunk.request));
      offset_ += chunk.bytes;
      ++posted_;
      moved = true;
    }
    return moved;
  }
  bool leaves_nothing_to_enqueue() const { return landed_ == message_.bytes; }
  bool finished() const { return leaves_nothing_to_enqueue() && freed_ == received_; }
  std::int64_t bytes_came() const { return bytes_came_; }

 private:
  Chunk& buffer(std::int64_t chunk) { return buffers_[static_cast<std::size_t>(chunk) % kBuffersPerMessage]; }

  Incoming message_;
  std::int64_t step_;
  std::array<Chunk, kBuffersPerMessage> buffers_;
  std::int64_t offset_ = 0;      ///< bytes asked of MPI
  std::int64_t bytes_came_ = 0;  ///< as MPI counted them
  std::int64_t landed_ = 0;      ///< bytes whose copy to the device is enqueued
  std::int64_t posted_ = 0;      ///< chunks asked of MPI
  std::int64_t received_ = 0;    ///< chunks that have come and whose copy is enqueued
  std::int64_t freed_ = 0;       ///< chunks whose buffer is free again
};

DeviceMpiTransport::DeviceMpiTransport(const Communicator& comm, int number, Path path)
    : comm_(comm.duplicate()),
      path_(path),
      number_(number),
      out_(StreamPriority::high),
      in_(StreamPriority::high),
      ledger_(comm_, "transfer by MPI", StepLedger::Counting::by_transport) {
  thread_ = std::thread([this] { run(); });
}

DeviceMpiTransport::~DeviceMpiTransport() {
  const bool failing = unwinding_.now();
  if (!failing) {
    const Watchdog::Wait wait = comm_.waiting("the last transfers by MPI");
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return failure_ || (jobs_.empty() && !busy_); });
  }
  {
    const std::scoped_lock lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
  if (failing) { return; }
  try {
    rethrow_failure();
    ledger_.drain();
  } catch (const std::exception& error) { comm_.abort(error.what()); }
}

void DeviceMpiTransport::rethrow_failure() {
  const std::scoped_lock lock(mutex_);
  if (failure_) { std::rethrow_exception(failure_); }
}

void DeviceMpiTransport::ready(std::int64_t step, Queue& queue) {
  const DeviceGuard guard(number_);
  ledger_.ready(step, stream_of(queue));
}

void DeviceMpiTransport::post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) {
  rethrow_failure();
  const DeviceGuard guard(number_);
  StepLedger::Entry& entry = ledger_.open(step, sends, receives);
  if (entry.number == 0) { return; }
  const std::scoped_lock lock(mutex_);
  jobs_.push_back({&entry, {sends.begin(), sends.end()}, {receives.begin(), receives.end()}});
  changed_.notify_all();
}

void DeviceMpiTransport::wait(std::int64_t step, Queue& queue) {
  const std::uint32_t number = ledger_.entry(step).number;
  if (number == 0) { return; }
  const DeviceGuard guard(number_);
  ledger_.mark_waiting(step, stream_of(queue));
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return failure_ || static_cast<std::int32_t>(enqueued_ - number) >= 0; });
  }
  rethrow_failure();
  ledger_.wait(step, stream_of(queue));
}

StepTraffic DeviceMpiTransport::traffic(std::int64_t step) {
  rethrow_failure();
  return ledger_.traffic(step);
}

void DeviceMpiTransport::run() {
  try {
    ANNULUS_CUDA(cudaSetDevice(number_));
    while (true) {
      Job job;
      {
        std::unique_lock lock(mutex_);
        busy_ = false;
        changed_.notify_all();
        changed_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
        if (stop_) { return; }
        job = std::move(jobs_.front());
        jobs_.pop_front();
        busy_ = true;
      }
      path_ == Path::direct ? move_direct(job) : move_staged(job);
    }
  } catch (const std::exception& error) {
    // The host may stand in a launch behind a transfer that will never come; nobody else can speak then.
    if (comm_.size() > 1) { comm_.abort(comm_.watchdog().describe() + error.what()); }
    const std::scoped_lock lock(mutex_);
    failure_ = std::current_exception();
    changed_.notify_all();
  }
}

void DeviceMpiTransport::finish_step(const Job& job) {
  ledger_.complete(*job.entry, in_.get());
  const std::scoped_lock lock(mutex_);
  enqueued_ = job.entry->number;
  changed_.notify_all();
}

void DeviceMpiTransport::move_staged(const Job& job) {
  const std::size_t buffers = (job.sends.size() + job.receives.size()) * kBuffersPerMessage;
  while (staging_.size() < buffers) {
    staging_.emplace_back(PinnedBuffer(static_cast<std::size_t>(kStagedChunkBytes)), CudaEvent(cudaEventDisableTiming));
  }
  std::size_t next = 0;
  const auto take_buffers = [&] {
    std::array<Chunk, kBuffersPerMessage> taken;
    for (Chunk& chunk : taken) {
      chunk.staging = staging_[next].first.get();
      chunk.copied = staging_[next++].second.get();
    }
    return taken;
  };
  std::vector<Departure> departures;
  std::vector<Landing> landings;
  for (const Outgoing& message : job.sends) { departures.emplace_back(message, take_buffers()); }
  for (const Incoming& message : job.receives) { landings.emplace_back(message, job.entry->step, take_buffers()); }

  for (const CudaStream* stream : {&out_, &in_}) {
    ANNULUS_CUDA(cudaStreamWaitEvent(stream->get(), job.entry->ready.passed(), cudaEventWaitDefault));
    ledger_.begin(*job.entry, stream->get());
  }
  const auto for_all = [&](auto&& holds) {
    return std::all_of(departures.begin(), departures.end(), holds) && std::all_of(landings.begin(), landings.end(), holds);
  };
  bool end_enqueued = false;
  Patience patience;
  while (!stop_) {
    bool moved = false;
    for (Departure& message : departures) { moved = message.advance(comm_.get(), out_.get()) || moved; }
    for (Landing& message : landings) { moved = message.advance(comm_, in_.get()) || moved; }
    if (!end_enqueued && for_all([](const auto& message) { return message.leaves_nothing_to_enqueue(); })) {
      ANNULUS_CUDA(cudaEventRecord(left_.get(), out_.get()));
      ANNULUS_CUDA(cudaStreamWaitEvent(in_.get(), left_.get(), cudaEventWaitDefault));
      for (const Landing& message : landings) { job.entry->bytes_received += message.bytes_came(); }
      finish_step(job);
      end_enqueued = true;
    }
    if (end_enqueued && for_all([](const auto& message) { return message.finished(); })) { return; }
    if (moved) {
      patience.moved();
      comm_.watchdog().progress();
    } else {
      patience.pause();
    }
  }
}

void DeviceMpiTransport::move_direct(const Job& job) {
  // MPI knows nothing of streams: the data must be there before it is asked to send, and the slot free before it may write.
  Patience patience;
  while (!is_reached(job.entry->ready.passed())) {
    if (stop_) { return; }
    patience.pause();
  }
  ledger_.begin(*job.entry, in_.get());
  struct Expected {
    std::int64_t peer;
    std::int64_t bytes;
  };
  std::vector<MPI_Request> requests;
  std::vector<Expected> expected;
  for (const Incoming& message : job.receives) {
    for_each_message_chunk(message.bytes, [&](std::int64_t offset, int count) {
      expected.push_back({message.peer, count});
      ANNULUS_MPI(MPI_Irecv(message.data + offset, count, MPI_BYTE, checked_narrow<int>(message.peer), kTag, comm_.get(),
                            &requests.emplace_back(MPI_REQUEST_NULL)));
    });
  }
  for (const Outgoing& message : job.sends) {
    for_each_message_chunk(message.bytes, [&](std::int64_t offset, int count) {
      ANNULUS_MPI(MPI_Isend(message.data + offset, count, MPI_BYTE, checked_narrow<int>(message.peer), kTag, comm_.get(),
                            &requests.emplace_back(MPI_REQUEST_NULL)));
    });
  }
  std::size_t open = requests.size();
  while (open > 0) {
    if (stop_) { return; }
    bool moved = false;
    for (std::size_t index = 0; index < requests.size(); ++index) {
      if (requests[index] == MPI_REQUEST_NULL) { continue; }
      int done = 0;
      MPI_Status status;
      ANNULUS_MPI(MPI_Test(&requests[index], &done, &status));
      if (done == 0) { continue; }
      if (index < expected.size()) {
        job.entry->bytes_received += counted(status, expected[index].bytes, job.entry->step, comm_.rank_in_job(expected[index].peer));
      }
      --open;
      moved = true;
    }
    if (moved) {
      patience.moved();
      comm_.watchdog().progress();
    } else {
      patience.pause();
    }
  }
  finish_step(job);
}

std::unique_ptr<Transport> make_device_mpi_transport(const Communicator& comm, Device& device) {
  int number = 0;
  together(comm, [&] { number = device_of(device); });
  const DeviceGuard guard(number);
  const bool direct = comm.min(mpi_cuda_support() == MpiCudaSupport::yes ? 1 : 0) == 1;
  if (comm.rank() == 0) {
    spdlog::info("transport mpi: {}",
                 direct ? "this MPI library takes device pointers" : "device memory is staged through pinned host memory");
  }
  return std::make_unique<DeviceMpiTransport>(comm, number, direct ? DeviceMpiTransport::Path::direct : DeviceMpiTransport::Path::staged);
}

}  // namespace annulus
