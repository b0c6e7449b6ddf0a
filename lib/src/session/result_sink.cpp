// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/result_sink.hpp>

#include <annulus/core/error.hpp>
#include <annulus/core/step_timing.hpp>
#include <annulus/pattern/covered_rows.hpp>
#include <annulus/pattern/permutation.hpp>

#include "io/element_convert.hpp"
#include "permuted_rows.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <set>
#include <span>

namespace annulus {

namespace {

/// Rows of O and LSE that are looked at, or pass through rank 0, at a time.
constexpr std::int64_t kResultChunkBytes = std::int64_t{4} << 20;
constexpr int kOutputTag = 11;
constexpr int kLseTag = 12;
constexpr int kGradientTag = 13;  // and those after it, one for each tensor

/// Rows of a rank, by their numbers in the plan.
struct Chunk : ResultRows {
  std::int64_t local_first = 0;
  std::int64_t stride = 1;  ///< from one of its rows to the next

  std::int64_t row(std::int64_t number) const { return first + number * stride; }

  void read(RingExecutor& executor) {
    executor.read_output(batch, local_first, count, output.data());
    executor.read_lse(batch, local_first, count, lse.data());
    for (std::size_t index = 0; index < kGradients.size(); ++index) {
      if (!gradients[index].empty()) { executor.read_gradient(kGradients[index], batch, local_first, count, gradients[index].data()); }
    }
  }

  /// Makes the output that of a layer, whose rows are this long.
  void resize_for_layer(std::int64_t row_bytes) { output.resize(static_cast<std::size_t>(count * row_bytes)); }
  void read(LayerExecutor& layer) { layer.read_output(batch, local_first, count, output.data()); }
};

/// Of a row of y; 0 without a layer.
std::int64_t layer_row_bytes(const Session& session) {
  const Config& config = session.resolved().config;
  return config.layer ? config.layer->embed * size_of(config.problem.dtype) : 0;
}

/// All chunks of one rank's rows. Where neighbours of the file are one rank's they are written in this order, and both sides of a transfer
/// walk the same list.
/// @param problem  of the rank's ring
template <class Visit>
void for_each_chunk(const Session& session, const Problem& problem, std::int64_t rank, Visit&& visit) {
  const ResultTensors tensors = result_tensors(session.resolved().config);
  const std::int64_t most = std::max<std::int64_t>(1, kResultChunkBytes / result_row_bytes(problem, tensors));
  Chunk chunk;
  for (const ShardPiece& piece : session.partition().shard(rank % session.grid().seq).pieces) {
    chunk.stride = piece.global.stride;
    for (chunk.batch = 0; chunk.batch < problem.batch; ++chunk.batch) {
      for (std::int64_t done = 0; done < piece.global.count; done += chunk.count) {
        chunk.first = piece.global[done];
        chunk.local_first = piece.local_first + done;
        chunk.count = std::min(most, piece.global.count - done);
        chunk.resize(problem, tensors);
        visit(chunk);
      }
    }
  }
}

/// Counts the rows of chunks, on one rank.
class RowCounter {
 public:
  explicit RowCounter(const Session& session)
      : problem_(session.problem()),
        pattern_(session.pattern()),
        order_(pattern_.order, problem_.seq_len),
        covered_(problem_, pattern_),
        zero_keys_(zero_key_branches()) {}

  /// @param chunk  of the rows of the cell
  void look_at(const Chunk& chunk, const GridCell& cell) {
    known_.clear();
    const std::int64_t heads = cell.problem.heads;
    const std::int64_t batch = cell.first_batch + chunk.batch;
    const bool all_finite = !first_non_finite(problem_.dtype, chunk.output.data(), chunk.count * heads * problem_.head_dim).has_value();
    for (std::int64_t in_cell = 0; in_cell < heads; ++in_cell) {
      const std::int64_t head = cell.first_head + in_cell;
      for (std::int64_t i = 0; i < chunk.count; ++i) {
        const float lse = chunk.lse[static_cast<std::size_t>(in_cell * chunk.count + i)];
        if (!zero_keys_.empty()) { add_zero_keys(head, chunk.row(i), lse); }
        const bool uncovered = lse == -std::numeric_limits<float>::infinity() && !covered_.sees_key(batch, head, chunk.row(i));
        uncovered_ += uncovered ? 1 : 0;
        if ((uncovered || std::isfinite(lse)) && (all_finite || output_is_finite(chunk, i * heads + in_cell))) { continue; }
        add_non_finite(batch, head, chunk, i);
      }
    }
    for (std::size_t index = 0; index < kGradients.size(); ++index) { look_at_gradient(chunk, kGradients[index], index, cell); }
  }

  /// Rows of a gradient, of which those that O or another gradient made known count no more.
  void look_at_gradient(const Chunk& chunk, Tensor tensor, std::size_t index, const GridCell& cell) {
    const std::vector<std::byte>& rows = chunk.gradients[index];
    const std::int64_t bytes = row_bytes(cell.problem, tensor);
    const std::int64_t elements = bytes / size_of(problem_.dtype);
    if (rows.empty() || !first_non_finite(problem_.dtype, rows.data(), chunk.count * elements)) { return; }
    for (std::int64_t i = 0; i < chunk.count; ++i) {
      const std::optional<std::int64_t> first = first_non_finite(problem_.dtype, rows.data() + i * bytes, elements);
      if (!first || known_.contains(i)) { continue; }
      const std::int64_t group = tensor == Tensor::q ? 1 : cell.problem.group_size();
      add_non_finite(cell.first_batch + chunk.batch, cell.first_head + *first / problem_.head_dim * group, chunk, i);
    }
  }

  /// The same rows of y, after look_at() saw those of O.
  void look_at_layer(const Chunk& chunk, const GridCell& cell) {
    const std::int64_t bytes = static_cast<std::int64_t>(chunk.output.size()) / chunk.count;
    for (std::int64_t i = 0; i < chunk.count; ++i) {
      const bool finite = !first_non_finite(problem_.dtype, chunk.output.data() + i * bytes, bytes / size_of(problem_.dtype));
      if (!finite && !known_.contains(i)) { add_non_finite(cell.first_batch + chunk.batch, 0, chunk, i); }
    }
  }

  /// Over all ranks. Collective.
  RowCounts total(const Communicator& comm) const {
    RowCounts counts;
    counts.uncovered = comm.sum(uncovered_);
    counts.non_finite = comm.sum(non_finite_);
    for (const ZeroKeys& branch : zero_keys_) {
      const double shares = comm.sum(branch.shares);
      counts.zero_key_shares.push_back(shares / static_cast<double>(std::max<std::int64_t>(1, comm.sum(branch.rows))));
    }
    const std::int64_t first = comm.min(first_);
    if (counts.non_finite > 0) {
      counts.first_non_finite = {first / problem_.seq_len / problem_.heads, first / problem_.seq_len % problem_.heads,
                                 first % problem_.seq_len};
    }
    return counts;
  }

 private:
  /// Of one branch.
  struct ZeroKeys {
    double shares = 0;  ///< sum over rows
    std::int64_t rows = 0;
  };
  std::size_t zero_key_branches() const { return pattern_.ragged == Ragged::zero_keys ? pattern_.branches.size() : 0; }

  /// A key of zeros scores 0, so each takes exp(0 - LSE) of the row's softmax.
  void add_zero_keys(std::int64_t head, std::int64_t row, float lse) {
    covered_.for_each_branch(head, row, [&](std::int64_t branch, const Rows<Global>& rows) {
      ZeroKeys& sums = zero_keys_[static_cast<std::size_t>(branch)];
      sums.shares += static_cast<double>(zero_keys(problem_, pattern_, branch, rows)) * std::exp(-static_cast<double>(lse));
      ++sums.rows;
    });
  }

  /// Row number `i` of a chunk.
  void add_non_finite(std::int64_t batch, std::int64_t head, const Chunk& chunk, std::int64_t i) {
    known_.insert(i);
    ++non_finite_;
    first_ = std::min(first_, (batch * problem_.heads + head) * problem_.seq_len + order_.row_at(chunk.row(i)));
  }

  /// Of one head of one row.
  bool output_is_finite(const Chunk& chunk, std::int64_t row_head) const {
    const std::int64_t begin = row_head * problem_.head_dim * size_of(problem_.dtype);
    return !first_non_finite(problem_.dtype, chunk.output.data() + begin, problem_.head_dim).has_value();
  }

  const Problem& problem_;
  const Pattern& pattern_;
  Permutation order_;
  CoveredRows covered_;
  std::vector<ZeroKeys> zero_keys_;  ///< by branch, or none
  std::set<std::int64_t> known_;     ///< rows of the chunk that are counted as not finite
  std::int64_t uncovered_ = 0;
  std::int64_t non_finite_ = 0;
  std::int64_t first_ = std::numeric_limits<std::int64_t>::max();  ///< of the non-finite: (batch * heads + head) * seq_len + row
};

/// Of `rank`, if it runs in this process: its executor, and the layer around it if there is one.
struct LocalRank {
  RingExecutor* executor = nullptr;
  LayerExecutor* layer = nullptr;
};
LocalRank local_rank(const Session& session, std::int64_t rank) {
  const bool alone = session.comm().size() == 1;
  if (!alone && rank != session.comm().rank()) { return {}; }
  const std::size_t index = alone ? static_cast<std::size_t>(rank) : 0;
  return {session.executors()[index].get(), session.layers().empty() ? nullptr : session.layers()[index].get()};
}

/// collect_permuted() where other ranks of the job take part too: what the ring agrees on is a failure that they would wait for.
template <class Take>
void collect_in_job(const Session& session, std::int64_t ring, Take&& take) {
  try {
    collect_permuted(session, ring, take);
  } catch (const std::exception& error) {
    if (session.grid().rings() > 1 && session.comm().size() > 1) { session.comm().abort(error.what()); }
    throw;
  }
}

}  // namespace

std::unique_ptr<ResultFile> create_result(const ResolvedConfig& resolved, const Communicator& comm) {
  std::unique_ptr<ResultFile> file;
  const Config& config = resolved.config;
  together(comm, [&] {
    if (comm.rank() != 0 || config.output.empty()) { return; }
    const std::int64_t steps = resolved.ranks == 1 ? 1 : 2 * resolved.ranks;  // at least
    constexpr auto kStepBytes = static_cast<std::int64_t>(kStepNumbers.size() * sizeof(double));
    file = std::make_unique<ResultFile>(config.output, config.force, config.problem, steps * kStepBytes,
                                        config.layer ? config.layer->embed : 0, result_tensors(config));
  });
  return file;
}

RowCounts count_rows(const Session& session) {
  RowCounter counter(session);
  together(session.comm(), [&] {
    for (const LocalRing& ring : session.rings()) {
      for (std::size_t index = 0; index < ring.executors.size(); ++index) {
        RingExecutor& executor = *ring.executors[index];
        for_each_chunk(session, ring.cell.problem, executor.plan().rank, [&](Chunk& chunk) {
          chunk.read(executor);
          counter.look_at(chunk, ring.cell);
          if (ring.layers.empty()) { return; }
          chunk.resize_for_layer(layer_row_bytes(session));
          chunk.read(*ring.layers[index]);
          counter.look_at_layer(chunk, ring.cell);
        });
      }
    }
  });
  return counter.total(session.comm());
}

void write_rows(const Session& session, ResultFile* file, const std::function<void()>& then) {
  const Communicator& comm = session.comm();
  ANNULUS_EXPECTS((file != nullptr) == (comm.rank() == 0), "rank {} {} a result file", comm.rank(), file != nullptr ? "has" : "lacks");
  // A failing disk must not leave the others sending for ever: rank 0 notes the failure, takes what comes and tells all at the end.
  std::exception_ptr failure;
  const auto guarded = [&](auto&& write) {
    if (failure) { return; }
    try {
      write();
    } catch (...) { failure = std::current_exception(); }
  };
  const bool gradients = session.resolved().config.gradients;
  // Takes rows of a cell from `process`, which has them, to the file.
  const auto pass = [&](std::int64_t process, const GridCell& cell, ResultRows& rows) {
    comm.watchdog().progress();
    if (comm.rank() != 0) {
      if (comm.rank() != process) { return; }
      comm.send(rows.output, 0, kOutputTag);
      comm.send(std::as_bytes(std::span(rows.lse)), 0, kLseTag);
      for (std::size_t index = 0; index < kGradients.size() && gradients; ++index) {
        comm.send(rows.gradients[index], 0, kGradientTag + static_cast<int>(index));
      }
      return;
    }
    if (process != 0) {
      comm.receive(rows.output, process, kOutputTag);
      comm.receive(std::as_writable_bytes(std::span(rows.lse)), process, kLseTag);
      for (std::size_t index = 0; index < kGradients.size() && gradients; ++index) {
        comm.receive(rows.gradients[index], process, kGradientTag + static_cast<int>(index));
      }
    }
    guarded([&] {
      const ResultBox box{cell.first_batch + rows.batch, rows.first, rows.count, cell.first_head, cell.problem.heads};
      file->write_output(box, rows.output.data());
      file->write_lse(box, rows.lse.data());
      for (std::size_t index = 0; index < kGradients.size() && gradients; ++index) {
        const Tensor tensor = kGradients[index];
        const ResultBox of_keys{box.batch, box.first, box.count, cell.first_kv_head, cell.problem.kv_heads};
        file->write_gradient(tensor, tensor == Tensor::q ? box : of_keys, rows.gradients[index].data());
      }
    });
  };
  for (std::int64_t ring = 0; ring < session.grid().rings(); ++ring) {
    const GridCell cell = session.cell(ring);
    const std::int64_t first_rank = ring * session.grid().seq;
    const auto process_of = [&](std::int64_t rank) { return comm.size() == 1 ? 0 : first_rank + rank; };
    if (session.moves_rows()) {
      if (comm.rank() == 0 || session.local_ring(ring) != nullptr) {
        collect_in_job(session, ring, [&](std::int64_t process, ResultRows& rows) { pass(process_of(process), cell, rows); });
      }
      continue;
    }
    for (std::int64_t rank = 0; rank < session.grid().seq; ++rank) {
      const LocalRank local = local_rank(session, first_rank + rank);
      if (local.executor == nullptr && comm.rank() != 0) { continue; }
      for_each_chunk(session, cell.problem, rank, [&](Chunk& chunk) {
        if (local.executor != nullptr) { chunk.read(*local.executor); }
        if (session.resolved().layer) { chunk.resize_for_layer(layer_row_bytes(session)); }
        if (local.layer != nullptr) { chunk.read(*local.layer); }
        pass(process_of(rank), cell, chunk);
      });
    }
  }
  if (comm.rank() == 0) { guarded(then); }
  comm.agree(failure);
}

void write_result(const Session& session, ResultFile* file, const std::vector<std::vector<StepTiming>>& timings, const RowCounts& counts,
                  const std::vector<std::pair<std::string, std::string>>& provenance) {
  write_rows(session, file, [&] {
    const StepColumns steps = step_columns(timings);
    file->write_columns("/timings", std::array{steps.ranks, steps.steps}, steps.columns);
    file->write_counts(counts);
    file->write_provenance(provenance);
    file->commit();
  });
}

}  // namespace annulus
