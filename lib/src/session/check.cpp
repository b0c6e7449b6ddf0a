// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/check.hpp>

#include <annulus/core/error.hpp>
#include <annulus/verify/gradient_oracle.hpp>
#include <annulus/verify/layer_oracle.hpp>
#include <annulus/verify/oracle.hpp>
#include <annulus/verify/random_problem.hpp>

#include "verify/order_table.hpp"
#include "verify/splitmix64.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>
#include <tuple>

namespace annulus {

namespace {

/// Query-key products (times head_dim) up to which every row is checked.
constexpr double kSmallWork = 2e9;
constexpr std::int64_t kSampledRows = 256;
/// The same up to which the gradients of all heads are.
constexpr double kSmallGradientWork = 2.5e8;

/// Query-key products, times head_dim, of all rows and heads, whatever the pattern.
double work_of(const Problem& problem) {
  return static_cast<double>(problem.batch * problem.seq_len) * static_cast<double>(problem.heads) * static_cast<double>(problem.seq_len) *
         static_cast<double>(problem.head_dim);
}

/// Rows to check, the same on all ranks, ascending: all, or a sample that always holds the first and the last row.
std::vector<RowId> rows_to_check(const Problem& problem, std::int64_t wanted, std::uint64_t seed) {
  const std::int64_t total = problem.batch * problem.seq_len;
  if (wanted == 0) { wanted = work_of(problem) <= kSmallWork ? total : kSampledRows; }
  std::vector<RowId> rows;
  if (wanted >= total) {
    for (std::int64_t index = 0; index < total; ++index) { rows.push_back({index / problem.seq_len, index % problem.seq_len}); }
    return rows;
  }
  std::set<std::int64_t> chosen{0};
  if (wanted > 1) { chosen.insert(total - 1); }
  std::uint64_t state = seed;
  while (static_cast<std::int64_t>(chosen.size()) < wanted) {
    chosen.insert(static_cast<std::int64_t>(splitmix64(state) % static_cast<std::uint64_t>(total)));
  }
  for (const std::int64_t index : chosen) { rows.push_back({index / problem.seq_len, index % problem.seq_len}); }
  return rows;
}

/// Where a rank keeps a row, which is at `row` of the order, from the partition's definition and not from the plan that is being checked;
/// negative if it does not own it.
std::int64_t local_row(PartitionKind partition, std::int64_t seq_len, std::int64_t ranks, std::int64_t rank, std::int64_t row) {
  std::int64_t pieces = ranks;
  std::vector<std::int64_t> owned{rank};
  switch (partition) {
    case PartitionKind::contiguous:
    case PartitionKind::automatic:  // is resolved
      break;
    case PartitionKind::zigzag:
      pieces = 2 * ranks;
      owned.push_back(pieces - 1 - rank);
      break;
    case PartitionKind::striped:
      return row % ranks == rank ? row / ranks : -1;
  }
  std::int64_t before = 0;  // rows of the pieces before this one
  for (const std::int64_t piece : owned) {
    const std::int64_t spare = seq_len % pieces;  // the first pieces have one more
    const std::int64_t first = piece * (seq_len / pieces) + std::min(piece, spare);
    const std::int64_t rows = seq_len / pieces + (piece < spare ? 1 : 0);
    if (row >= first && row < first + rows) { return before + row - first; }
    before += rows;
  }
  return -1;
}

/// Where the rows stand in the order of the sequence, by the checker's own account of it.
std::vector<std::int64_t> positions_of(const std::vector<RowId>& rows, const Session& session) {
  std::vector<std::int64_t> positions;
  std::vector<std::int64_t> table;
  if (session.is_permuted()) { table = position_table(session.pattern().order, session.problem().seq_len); }
  for (const RowId& row : rows) { positions.push_back(table.empty() ? row.row : table[static_cast<std::size_t>(row.row)]); }
  return positions;
}

/// What the session's kernel does to probabilities.
PlainProbabilities plain_probabilities(const Session& session) {
  if (!session.kernel().rounds_probabilities(session.problem().dtype)) { return PlainProbabilities::kept; }
  switch (session.resolved().config.kernel) {
    case KernelKind::fused:
      return PlainProbabilities::rounded_at_scales;
    case KernelKind::automatic:
    case KernelKind::cublas:
      break;
  }
  return PlainProbabilities::rounded;
}

/// Which of the rows one executor's rank has, of its shard and its batch entries, and where.
struct OwnedRows {
  std::vector<RowId> rows;
  std::vector<std::int64_t> local;
};

OwnedRows owned_rows(const RingExecutor& executor, const GridCell& cell, const std::vector<RowId>& rows,
                     const std::vector<std::int64_t>& positions, const Session& session) {
  OwnedRows owned;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t at =
        local_row(session.resolved().config.partition, session.problem().seq_len, session.grid().seq, executor.plan().rank, positions[i]);
    const std::int64_t entry = rows[i].batch - cell.first_batch;
    if (at < 0 || entry < 0 || entry >= cell.problem.batch) { continue; }
    owned.rows.push_back(rows[i]);
    owned.local.push_back(at);
  }
  return owned;
}

/// The KV heads whose gradients are compared, the same on all ranks: all, or one where the oracle would take long for all.
CheckedHeads gradient_heads(const Problem& problem, std::uint64_t seed) {
  if (work_of(problem) <= kSmallGradientWork) { return {0, problem.kv_heads}; }
  return {static_cast<std::int64_t>(splitmix64(seed) % static_cast<std::uint64_t>(problem.kv_heads)), 1};
}

/// Heads [first, first + count) of one gradient of rows that a rank keeps.
std::vector<std::byte> read_gradient(RingExecutor& executor, const GridCell& cell, const OwnedRows& owned, Tensor tensor,
                                     std::int64_t first, std::int64_t count) {
  const std::int64_t row = row_bytes(cell.problem, tensor);
  const std::int64_t head = row / heads_of(cell.problem, tensor);
  std::vector<std::byte> found;
  std::vector<std::byte> all(static_cast<std::size_t>(row));
  for (std::size_t i = 0; i < owned.rows.size(); ++i) {
    executor.read_gradient(tensor, owned.rows[i].batch - cell.first_batch, owned.local[i], 1, all.data());
    found.insert(found.end(), all.begin() + first * head, all.begin() + (first + count) * head);
  }
  return found;
}

/// Compares the gradients that one executor's rank has of the rows.
GradientSums compare_owned_gradients(RingExecutor& executor, const GridCell& cell, const std::vector<RowId>& rows,
                                     const std::vector<std::int64_t>& positions, const CheckedHeads& kv_heads, const Session& session) {
  const OwnedRows owned = owned_rows(executor, cell, rows, positions, session);
  const std::int64_t first = std::max(kv_heads.first, cell.first_kv_head);
  const std::int64_t count = std::min(kv_heads.first + kv_heads.count, cell.first_kv_head + cell.problem.kv_heads) - first;
  if (owned.rows.empty() || count <= 0) { return {}; }
  const std::int64_t group = session.problem().group_size();
  const std::int64_t in_cell = first - cell.first_kv_head;
  const std::vector<std::byte> dq = read_gradient(executor, cell, owned, Tensor::q, in_cell * group, count * group);
  const std::vector<std::byte> dk = read_gradient(executor, cell, owned, Tensor::k, in_cell, count);
  const std::vector<std::byte> dv = read_gradient(executor, cell, owned, Tensor::v, in_cell, count);
  const GradientRows oracle = oracle_gradients(*session.resolved().source, session.problem(), session.pattern(), owned.rows, {first, count},
                                               plain_probabilities(session), static_cast<int>(session.resolved().config.threads),
                                               &session.comm().watchdog().progress_counter());
  return compare_gradients(session.problem(), owned.rows, {first, count}, {dq.data(), dk.data(), dv.data()}, oracle);
}

/// Compares what one executor's rank has of the rows: those of its shard and its batch entries, with its heads. `layer` is the one around
/// it, or null; `positions` are those of the rows in the order of the sequence.
ErrorSums compare_owned(RingExecutor& executor, LayerExecutor* layer, const GridCell& cell, const std::vector<RowId>& rows,
                        const std::vector<std::int64_t>& positions, const Session& session) {
  const Problem& problem = session.problem();
  const CheckedHeads heads{cell.first_head, cell.problem.heads};
  const auto& [owned, local] = owned_rows(executor, cell, rows, positions, session);
  if (owned.empty()) { return {}; }
  const Config& config = session.resolved().config;
  const std::int64_t bytes = layer != nullptr ? config.layer->embed * size_of(problem.dtype) : row_bytes(cell.problem, Tensor::q);
  std::vector<std::byte> out(static_cast<std::size_t>(bytes) * owned.size());
  std::vector<float> lse(static_cast<std::size_t>(heads.count) * owned.size());
  for (std::size_t index = 0; index < owned.size();) {
    // Neighbouring rows are read together: on a device each read costs a round trip.
    std::size_t end = index + 1;
    while (end < owned.size() && end - index < 64 && owned[end].batch == owned[index].batch && local[end] == local[end - 1] + 1) { ++end; }
    const auto count = static_cast<std::int64_t>(end - index);
    const std::int64_t entry = owned[index].batch - cell.first_batch;
    std::byte* rows_of_output = out.data() + static_cast<std::size_t>(bytes) * index;
    if (layer != nullptr) {
      layer->read_output(entry, local[index], count, rows_of_output);
    } else {
      executor.read_output(entry, local[index], count, rows_of_output);
    }
    std::vector<float> by_head(static_cast<std::size_t>(heads.count * count));
    executor.read_lse(entry, local[index], count, by_head.data());
    for (std::int64_t row = 0; row < count; ++row) {
      for (std::int64_t head = 0; head < heads.count; ++head) {
        lse[(index + static_cast<std::size_t>(row)) * static_cast<std::size_t>(heads.count) + static_cast<std::size_t>(head)] =
            by_head[static_cast<std::size_t>(head * count + row)];
      }
    }
    index = end;
  }
  const int threads = static_cast<int>(config.threads);
  std::atomic<std::uint64_t>* progress = &session.comm().watchdog().progress_counter();
  if (layer != nullptr) {
    const LayerOracleRows oracle = layer_oracle_rows(*session.resolved().layer, *config.layer, problem, session.pattern(), owned,
                                                     plain_probabilities(session), threads, progress);
    return compare_layer_rows(*config.layer, problem, owned, out.data(), lse.data(), oracle);
  }
  const OracleRows oracle =
      oracle_rows(*session.resolved().source, problem, session.pattern(), owned, heads, plain_probabilities(session), threads, progress);
  return compare_rows(problem, owned, heads, out.data(), lse.data(), oracle);
}

/// Sums of all ranks in rank order, so that every rank comes to the same verdict. Collective.
template <class Sums>
Sums sum_of_ranks(const Communicator& comm, const Sums& own) {
  Sums sums;
  const std::string bytes(reinterpret_cast<const char*>(&own), sizeof(own));
  for (const std::string& part : comm.all_gather(bytes)) {
    Sums theirs;
    std::memcpy(&theirs, part.data(), sizeof(theirs));
    sums.add(theirs);
  }
  return sums;
}

/// Adds the gradients' verdicts to the report. Collective.
void check_gradients(Session& session, const std::vector<RowId>& rows, CaseReport& report) {
  const Communicator& comm = session.comm();
  const Problem& problem = session.problem();
  const CheckedHeads kv_heads = gradient_heads(problem, session.resolved().config.seed);
  GradientSums own;
  together(comm, [&] {
    const std::vector<std::int64_t> positions = positions_of(rows, session);
    for (const LocalRing& ring : session.rings()) {
      for (const auto& executor : ring.executors) {
        own.add(compare_owned_gradients(*executor, ring.cell, rows, positions, kv_heads, session));
      }
    }
  });
  const GradientSums sums = sum_of_ranks(comm, own);
  report.gradient_kv_heads = kv_heads.count;
  const std::int64_t elements = std::ssize(rows) * kv_heads.count * problem.head_dim;
  for (const auto& [tensor, errors, name] :
       {std::tuple{Tensor::q, &sums.dq, "dQ"}, {Tensor::k, &sums.dk, "dK"}, {Tensor::v, &sums.dv, "dV"}}) {
    const std::int64_t expected = elements * (tensor == Tensor::q ? problem.group_size() : 1);
    ANNULUS_ASSERT(errors->count == expected, "{} elements of {} were compared, not {}", errors->count, name, expected);
    report.gradients.push_back({tensor, *errors, judge_gradient(problem, sums, tensor)});
    const Verdict& verdict = report.gradients.back().verdict;
    if (!verdict.passed && report.verdict.passed) {
      report.verdict.passed = false;
      report.verdict.reason = fmt::format("{}: {}", name, verdict.reason);
    }
  }
}

}  // namespace

CaseReport check_session(Session& session, std::int64_t rows) {
  const Communicator& comm = session.comm();
  const Problem& problem = session.problem();
  const std::vector<RowId> chosen = rows_to_check(problem, rows, session.resolved().config.seed);
  ErrorSums own;
  together(comm, [&] {
    const std::vector<std::int64_t> positions = positions_of(chosen, session);
    for (const LocalRing& ring : session.rings()) {
      for (std::size_t index = 0; index < ring.executors.size(); ++index) {
        LayerExecutor* layer = ring.layers.empty() ? nullptr : ring.layers[index].get();
        own.add(compare_owned(*ring.executors[index], layer, ring.cell, chosen, positions, session));
      }
    }
  });
  const ErrorSums sums = sum_of_ranks(comm, own);
  const std::optional<Layer>& layer = session.resolved().config.layer;
  const auto rows_compared = static_cast<std::int64_t>(chosen.size());
  if (layer) {
    require_all_compared(*layer, rows_compared, sums);
  } else {
    require_all_compared(problem, rows_compared, sums);
  }
  CaseReport report;
  report.sums = sums;
  report.verdict = layer ? judge_layer(sums) : judge(problem, sums);
  report.rows_checked = static_cast<std::int64_t>(chosen.size());
  report.rows_total = problem.batch * problem.seq_len;
  if (session.resolved().config.gradients) { check_gradients(session, chosen, report); }
  return report;
}

bool check(const Config& config, const Communicator& comm, StopRequest& stop, const std::function<void(const CaseReport&)>& report) {
  const auto run_case = [&](Config one, CaseReport header) {
    const ResolvedConfig resolved = resolve(std::move(one), comm);
    Session session(resolved, comm);
    session.load();
    session.run();
    CaseReport done = check_session(session, config.rows);
    done.name = std::move(header.name);
    done.flags = std::move(header.flags);
    report(done);
    return done.verdict.passed;
  };
  if (config.cases == 0) {
    if (stop.agreed(comm)) { return true; }
    return run_case(config, {.name = "configured problem", .flags = {}, .sums = {}, .verdict = {}, .gradients = {}});
  }

  together(comm, [&] {
    ANNULUS_EXPECTS(config.input.empty(), "--cases draws its own problems and takes no --input");
    ANNULUS_EXPECTS(!config.layer, "--cases draws attention alone, and a layer is configured");
  });
  const bool alone = comm.size() == 1 && config.transport != TransportKind::self;
  bool passed = true;
  for (std::int64_t number = 0; number < config.cases && !stop.agreed(comm); ++number) {
    RandomCase drawn = random_case(config.seed, number, alone ? std::nullopt : std::optional(comm.size()), config.kernel);
    // Gradients keep a KV head in one ring, and there are none of extra keys.
    if (config.gradients && drawn.grid.heads > drawn.problem.kv_heads) { drawn.grid = Grid(); }
    if (config.gradients) { drawn.problem.extra_keys = 0; }
    if (config.backend == BackendKind::cuda) { drawn.problem.dropout = {}; }
    Config one = config;
    one.problem = drawn.problem;
    one.pattern = drawn.pattern;
    one.schedule = drawn.schedule;
    one.partition = drawn.partition;
    one.grid = drawn.grid;
    one.tile_order = drawn.tile_order;
    one.scale = drawn.problem.scale;
    one.dtype.reset();
    one.seed = drawn.data_seed;
    if (alone) {
      one.virtual_ranks = drawn.ranks;
      one.transport = TransportKind::loopback;
    }
    passed = run_case(std::move(one), {.name = fmt::format("case {}: {}", number, drawn.describe()),
                                       .flags = drawn.flags() + (config.gradients ? " --gradients" : ""),
                                       .sums = {},
                                       .verdict = {},
                                       .gradients = {}}) &&
             passed;
  }
  return passed;
}

}  // namespace annulus
