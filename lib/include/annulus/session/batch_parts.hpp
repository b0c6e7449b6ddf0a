// SPDX-License-Identifier: Apache-2.0
// A batch that does not fit, or is not wanted, at once: its entries are computed in parts, and what is done is on the disk before the next
// part begins.
#pragma once

#include <annulus/io/result_file.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/session/session.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// What memory and plans of a session came to, on the rank where it is most. Since the session was made.
struct ServiceReport {
  std::int64_t high_water = 0;     ///< bytes in use
  std::int64_t planned = 0;        ///< bytes by plan
  std::int64_t taken = 0;          ///< allocations from the system
  std::int64_t reused = 0;         ///< allocations from what a pool had kept
  std::int64_t plans_made = 0;     ///< also by sessions before it
  std::int64_t plans_found = 0;    ///< in the cache, also by sessions before it
  std::int64_t device_own = 0;     ///< as MemoryReport
  std::int64_t device_others = 0;  ///< as MemoryReport
};

/// What one part came to.
struct PartReport {
  double ms = 0;  ///< of the slowest rank
  double tflops = 0;
  std::vector<std::vector<StepTiming>> timings;  ///< on rank 0
  RowCounts counts;
  ServiceReport services;
};

/// The parts of a run's batch, and the session that computes them one after another.
class BatchParts {
 public:
  /// Makes the first session. Collective.
  /// @param parts  0: by config.part_batch, or as few as memory allows
  /// @throws AgreedError as Session, or if a part would have fewer entries than the grid spreads
  BatchParts(const ResolvedConfig& resolved, const Communicator& comm, std::int64_t parts = 0);

  std::int64_t count() const { return count_; }
  GridCell part(std::int64_t index) const { return part_of_batch(resolved_.config.problem, count_, index); }
  /// A session of that part, with nothing loaded; where the problem is that of the part before, the same session. Collective.
  Session& session(std::int64_t index);
  /// Collective.
  ServiceReport services() const;
  /// Steps of the plan of the rank that has the most, in any part. Collective.
  std::int64_t most_steps() const;

 private:
  const ResolvedConfig& resolved_;
  const Communicator& comm_;
  PlanCache plans_;
  std::int64_t count_ = 1;
  std::unique_ptr<Session> session_;
};

/// What an earlier run of the same settings left at a result's place.
struct EarlierRun {
  bool complete = false;
  std::int64_t parts = 0;  ///< of the unfinished file; 0: there is none
};

/// What shapes plan and numbers of a run, with the input's values and the program's version, as lines of "name = value". Collective.
std::string settings_of(const ResolvedConfig& resolved, const Communicator& comm);

/// Looks for a complete or unfinished result of these settings at config.output. Collective.
/// @throws AgreedError that names the first setting that differs, or if a file there cannot be read
EarlierRun find_earlier_run(const ResolvedConfig& resolved, const std::string& settings, const Communicator& comm);

/// The result file of a run in parts, which whatever ends the job leaves to be gone on with.
///
/// Beside what every result holds: /parts/{first_entry, entries, complete, finished_at, host, total_ms, tflops, uncovered, non_finite,
/// memory_high_water, allocations_taken, allocations_reused, plans_made, plans_found} [part], /parts/first_non_finite [part, 3],
/// /parts/zero_key_shares [part, branch]; /timings/* are [part, rank, step].
class ResumableResult {
 public:
  /// Opens the unfinished file on rank 0, and makes it first if there is none. Collective. @throws AgreedError
  ResumableResult(const ResolvedConfig& resolved, const BatchParts& parts, const EarlierRun& earlier, const Communicator& comm,
                  const std::vector<std::pair<std::string, std::string>>& provenance);

  /// The same on all ranks.
  bool is_complete(std::int64_t part) const { return complete_[static_cast<std::size_t>(part)] != 0; }
  std::int64_t parts_complete() const;

  /// Writes the rows of a session and what they came to. They are on the disk before the part counts as complete, and that is there at
  /// return. Collective. @throws AgreedError
  void write(const Session& session, std::int64_t part, const PartReport& report);
  /// The counts of all parts together, which must be complete; on ranks other than 0 of non_finite alone. Collective.
  RowCounts counts() const;
  /// Puts the complete file in its place. Collective. @throws AgreedError
  void commit(const RowCounts& counts);

 private:
  const Communicator& comm_;
  const BatchParts& parts_;
  std::int64_t steps_;  ///< of /timings
  bool has_zero_keys_;
  std::unique_ptr<ResultFile> file_;  ///< on rank 0
  std::vector<std::int64_t> complete_;
};

/// Of all parts together, each with the number of its batch entries. @param parts  not empty
RowCounts sum_of(const std::vector<std::pair<RowCounts, std::int64_t>>& parts);

}  // namespace annulus
