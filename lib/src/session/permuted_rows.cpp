// SPDX-License-Identifier: Apache-2.0
#include "permuted_rows.hpp"

#include "cell_source.hpp"
#include "row_exchange.hpp"

#include <algorithm>
#include <cstring>

namespace annulus {

namespace {

constexpr auto kLseBytes = static_cast<std::int64_t>(sizeof(float));

/// What the exchange needs, of a session.
struct Permuted {
  explicit Permuted(const Session& session)
      : order(session.pattern().order, session.problem().seq_len), exchange(session.ring_comm(), order, session.partition()) {}
  Permuted(const Permuted&) = delete;
  Permuted& operator=(const Permuted&) = delete;

  Permutation order;
  RowExchange exchange;
};

/// Calls body(index of the ring's executor, begin, count) for stretches of positions that one executor of this process owns.
template <class Body>
void for_each_executor(const LocalRing& ring, const Partition& partition, std::span<const std::int64_t> positions, Body&& body) {
  const auto executor_of = [&](std::int64_t position) { return ring.executors.size() == 1 ? std::int64_t{0} : partition.owner(position); };
  for (std::size_t begin = 0, end = 0; begin < positions.size(); begin = end) {
    const std::int64_t index = executor_of(positions[begin]);
    for (end = begin + 1; end < positions.size() && executor_of(positions[end]) == index;) { ++end; }
    body(static_cast<std::size_t>(index), begin, end - begin);
  }
}

/// O, LSE and gradients of positions of this process, in one batch entry. All its LSE is held: of a device it would come a number at a
/// time.
class Results {
 public:
  Results(const LocalRing& ring, const Partition& partition, std::int64_t batch, ResultTensors tensors)
      : ring_(ring), partition_(partition), batch_(batch), tensors_(tensors) {
    for (const auto& executor : ring.executors) {
      const std::int64_t rows = executor->plan().local_rows;
      std::vector<float>& lse = lse_.emplace_back(static_cast<std::size_t>(ring.cell.problem.heads * rows));
      if (rows > 0) { executor->read_lse(batch, 0, rows, lse.data()); }
    }
  }

  /// Rows of result_row_bytes().
  void fetch(std::span<const std::int64_t> positions, std::byte* rows) {
    const Problem& problem = ring_.cell.problem;
    const std::int64_t output_bytes = row_bytes(problem, Tensor::q);
    for_each_executor(ring_, partition_, positions, [&](std::size_t index, std::size_t begin, std::size_t count) {
      RingExecutor& executor = *ring_.executors[index];
      const std::span<const std::int64_t> some = positions.subspan(begin, count);
      output_.resize(count * static_cast<std::size_t>(output_bytes));
      executor.fetch_output(batch_, some, output_.data());
      for (std::size_t i = 0; i < count; ++i, rows += result_row_bytes(problem, tensors_)) {
        std::memcpy(rows, output_.data() + static_cast<std::int64_t>(i) * output_bytes, static_cast<std::size_t>(output_bytes));
        const std::int64_t local = local_rows(executor.plan().shard, Rows<Global>(range(some[i], some[i] + 1))).only().first;
        for (std::int64_t head = 0; head < problem.heads; ++head) {
          const auto at = static_cast<std::size_t>(head * executor.plan().local_rows + local);
          std::memcpy(rows + output_bytes + head * kLseBytes, &lse_[index][at], static_cast<std::size_t>(kLseBytes));
        }
        if (tensors_ == ResultTensors::gradients) { fetch_gradients(executor, local, rows + output_bytes + problem.heads * kLseBytes); }
      }
    });
  }

 private:
  void fetch_gradients(RingExecutor& executor, std::int64_t local, std::byte* target) const {
    for (const Tensor tensor : kGradients) {
      executor.read_gradient(tensor, batch_, local, 1, target);
      target += row_bytes(ring_.cell.problem, tensor);
    }
  }

  const LocalRing& ring_;
  const Partition& partition_;
  std::int64_t batch_;
  ResultTensors tensors_;
  std::vector<std::vector<float>> lse_;  ///< by executor [heads, local rows]
  std::vector<std::byte> output_;
};

/// Takes rows of result_row_bytes() apart.
void take_apart(const Problem& problem, ResultTensors tensors, const std::byte* rows, ResultRows& result) {
  const std::int64_t output_bytes = row_bytes(problem, Tensor::q);
  for (std::int64_t i = 0; i < result.count; ++i, rows += result_row_bytes(problem, tensors)) {
    std::memcpy(result.output.data() + i * output_bytes, rows, static_cast<std::size_t>(output_bytes));
    for (std::int64_t head = 0; head < problem.heads; ++head) {
      std::memcpy(&result.lse[static_cast<std::size_t>(head * result.count + i)], rows + output_bytes + head * kLseBytes,
                  static_cast<std::size_t>(kLseBytes));
    }
    if (tensors != ResultTensors::gradients) { continue; }
    const std::byte* from = rows + output_bytes + problem.heads * kLseBytes;
    for (std::size_t index = 0; index < kGradients.size(); ++index) {
      const std::int64_t bytes = row_bytes(problem, kGradients[index]);
      std::memcpy(result.gradients[index].data() + i * bytes, from, static_cast<std::size_t>(bytes));
      from += bytes;
    }
  }
}

}  // namespace

ResultTensors result_tensors(const Config& config) { return config.gradients ? ResultTensors::gradients : ResultTensors::output; }

std::int64_t result_row_bytes(const Problem& problem, ResultTensors tensors) {
  std::int64_t bytes = row_bytes(problem, Tensor::q) + problem.heads * kLseBytes;
  for (const Tensor tensor : kGradients) { bytes += tensors == ResultTensors::gradients ? row_bytes(problem, tensor) : 0; }
  return bytes;
}

void ResultRows::resize(const Problem& problem, ResultTensors tensors) {
  for (std::size_t index = 0; index < kGradients.size() && tensors == ResultTensors::gradients; ++index) {
    gradients[index].resize(static_cast<std::size_t>(count * row_bytes(problem, kGradients[index])));
  }
  output.resize(static_cast<std::size_t>(count * row_bytes(problem, Tensor::q)));
  lse.resize(static_cast<std::size_t>(count * problem.heads));
}

void load_permuted(const Session& session, const LocalRing& ring) {
  const CellSource source(*session.resolved().source, ring.cell);
  const Problem& problem = ring.cell.problem;
  const Permuted permuted(session);
  for (const Tensor tensor : session.tensors()) {
    const std::int64_t bytes = row_bytes(problem, tensor);
    for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
      const auto read = [&](std::int64_t first, std::int64_t count, std::byte* rows) {
        source.read(tensor, batch, first, count, problem.dtype, rows);
        session.comm().watchdog().progress();
      };
      const auto place = [&](std::span<const std::int64_t> positions, const std::byte* rows) {
        for_each_executor(ring, session.partition(), positions, [&](std::size_t index, std::size_t begin, std::size_t count) {
          ring.executors[index]->place_rows(tensor, batch, positions.subspan(begin, count),
                                            rows + static_cast<std::int64_t>(begin) * bytes);
        });
      };
      permuted.exchange.spread(bytes, read, place);
    }
  }
  source.release_buffers();
}

void collect_permuted(const Session& session, std::int64_t ring, const std::function<void(std::int64_t process, ResultRows& rows)>& take) {
  const LocalRing* const here = session.local_ring(ring);
  const bool takes_part = here != nullptr;
  const Problem problem = session.cell(ring).problem;
  const Communicator& comm = session.ring_comm();
  const ResultTensors tensors = result_tensors(session.resolved().config);
  const std::int64_t bytes = result_row_bytes(problem, tensors);
  const Permuted permuted(session);
  const FileRounds file = permuted.exchange.file_rounds(bytes);
  ResultRows result;
  const auto take_round = [&](std::int64_t round, const std::byte* own_rows) {
    for (std::int64_t process = 0; process < comm.size(); ++process) {
      const Progression part = file.part(process, round);
      if (part.empty()) { continue; }
      result.first = part.first;
      result.count = part.count;
      result.resize(problem, tensors);
      if (takes_part && process == comm.rank()) { take_apart(problem, tensors, own_rows, result); }
      take(process, result);
    }
  };
  for (result.batch = 0; result.batch < problem.batch; ++result.batch) {
    if (!takes_part) {
      for (std::int64_t round = 0; round < file.rounds(); ++round) { take_round(round, nullptr); }
      continue;
    }
    std::unique_ptr<Results> own;
    together(comm, [&] { own = std::make_unique<Results>(*here, session.partition(), result.batch, tensors); });
    permuted.exchange.collect(
        bytes, [&](std::span<const std::int64_t> positions, std::byte* rows) { own->fetch(positions, rows); }, take_round);
  }
}

std::int64_t permuted_bytes(const Problem& problem, const Communicator& comm, std::span<const std::shared_ptr<const RingPlan>> plans) {
  std::int64_t lse = 0;
  bool gradients = false;
  for (const auto& plan : plans) {
    lse += plan->local_rows * problem.heads * kLseBytes;
    gradients = gradients || plan->routing.gradients;
  }
  // Results are taken apart once on their way in and once on their way out.
  const std::int64_t results =
      RowExchange::bytes(comm, problem.seq_len, result_row_bytes(problem, gradients ? ResultTensors::gradients : ResultTensors::output));
  return results + results / 2 + lse;
}

}  // namespace annulus
