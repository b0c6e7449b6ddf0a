// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/batch_parts.hpp>

#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/pattern/progression.hpp>
#include <annulus/session/result_sink.hpp>

#include "permuted_rows.hpp"
#include "same_problem.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <string_view>
#include <variant>

namespace annulus {

namespace {

constexpr std::size_t kHostBytes = 63;
constexpr auto kSettings = "/provenance/settings";

/// The first line in which two texts differ; empty if there is none.
std::pair<std::string_view, std::string_view> first_difference(std::string_view left, std::string_view right) {
  const auto take_line = [](std::string_view& text) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    return line;
  };
  while (!left.empty() || !right.empty()) {
    const std::string_view a = take_line(left);
    const std::string_view b = take_line(right);
    if (a != b) { return {a, b}; }
  }
  return {};
}

/// Whether there is a file, and requires that it is of these settings.
bool is_of_these_settings(const std::string& path, const std::string& settings) {
  if (!std::filesystem::exists(path)) { return false; }
  const ColumnValues found = read_result(path, kSettings);
  const auto* texts = std::get_if<std::vector<std::string>>(&found);
  ANNULUS_EXPECTS(texts != nullptr && texts->size() == 1, "result file '{}' does not say of which settings it is", path);
  const auto [theirs, ours] = first_difference(texts->front(), settings);
  ANNULUS_EXPECTS(theirs == ours, "--resume: '{}' is of other settings: '{}', not '{}'", path, theirs, ours);
  return true;
}

std::int64_t seconds_since_1970() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

BatchParts::BatchParts(const ResolvedConfig& resolved, const Communicator& comm, std::int64_t parts)
    : resolved_(resolved), comm_(comm), plans_(2 * resolved.ranks) {
  const std::int64_t batch = resolved.config.problem.batch;
  const std::int64_t asked = resolved.config.part_batch;
  // A part gives each row of the grid an entry.
  const std::int64_t most = batch / resolved.config.places.batch;
  const bool given = parts > 0 || asked > 0;
  count_ = parts > 0 ? parts : asked > 0 ? ceil_div(batch, asked) : 1;
  together(comm, [&] {
    ANNULUS_EXPECTS(count_ <= most, "--part-batch {}: {} parts of a batch of {} have fewer entries than the grid {} spreads", asked, count_,
                    batch, to_string(resolved.config.places));
  });
  for (;;) {
    try {
      session(0);
      return;
    } catch (const MemoryShortage& shortage) {
      if (given || count_ == most) { throw; }
      // Not all of the memory grows with the batch, so that this is a beginning.
      const double wanted = std::min(static_cast<double>(most), std::ceil(static_cast<double>(count_) * shortage.times()));
      count_ = std::max(count_ + 1, static_cast<std::int64_t>(wanted));
    }
  }
}

Session& BatchParts::session(std::int64_t index) {
  const GridCell wanted = part(index);
  if (session_ && session_->move_to(wanted)) { return *session_; }
  session_.reset();  // two would not fit
  session_ = std::make_unique<Session>(resolved_, comm_, TransportDecorator(), &plans_, wanted);
  return *session_;
}

ServiceReport BatchParts::services() const {
  const MemoryReport memory = session_->device().memory();
  return {.high_water = comm_.max(memory.high_water),
          .planned = comm_.max(session_->predicted_bytes()),
          .taken = comm_.max(memory.taken),
          .reused = comm_.max(memory.reused),
          .plans_made = comm_.max(plans_.made()),
          .plans_found = comm_.max(plans_.found()),
          .device_own = comm_.max(memory.device_own),
          .device_others = comm_.max(memory.device_others)};
}

std::int64_t BatchParts::most_steps() const {
  // With lengths of keys parts have plans of their own, none with more steps than that of the whole batch.
  std::int64_t steps = 0;
  together(comm_, [&] {
    for (const LocalRing& ring : session_->rings()) {
      const Problem whole = cell_of(resolved_.config.problem, session_->grid(), ring.number).problem;
      for (const auto& executor : ring.executors) {
        const RingPlan of_all =
            make_plan(whole, session_->pattern(), session_->partition(), routing_of(resolved_.config), executor->plan().rank);
        steps = std::max({steps, std::int64_t{std::ssize(executor->plan().steps)}, std::int64_t{std::ssize(of_all.steps)}});
      }
    }
  });
  return comm_.max(steps);
}

std::string settings_of(const ResolvedConfig& resolved, const Communicator& comm) {
  std::string text = fmt::format("version = {} {}\nranks = {}\n", build_info().version, build_info().git, resolved.ranks);
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    for (const Fact& fact : facts_of(resolved)) { text += fmt::format("{} = {}\n", fact.name, fact.value); }
    for (const Fingerprint& print : resolved.input().fingerprints(0, 1)) { text += fmt::format("{} = {:016x}\n", print.name, print.sum); }
  });
  return text;
}

EarlierRun find_earlier_run(const ResolvedConfig& resolved, const std::string& settings, const Communicator& comm) {
  EarlierRun earlier;
  const std::string& output = resolved.config.output;
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    earlier.complete = is_of_these_settings(output, settings);
    const std::string unfinished = unfinished_result_path(output);
    if (earlier.complete || !is_of_these_settings(unfinished, settings)) { return; }
    const ColumnValues complete = read_result(unfinished, "/parts/complete");
    earlier.parts = std::visit([](const auto& values) { return std::ssize(values); }, complete);
  });
  earlier.complete = comm.max(static_cast<std::int64_t>(earlier.complete ? 1 : 0)) != 0;
  earlier.parts = comm.max(earlier.parts);
  return earlier;
}

RowCounts sum_of(const std::vector<std::pair<RowCounts, std::int64_t>>& parts) {
  RowCounts sum;
  std::int64_t entries = 0;
  for (const auto& [counts, of_part] : parts) {
    sum.uncovered += counts.uncovered;
    if (sum.non_finite == 0) { sum.first_non_finite = counts.first_non_finite; }  // parts ascend, and so do their entries
    sum.non_finite += counts.non_finite;
    // Every entry has as many rows in a branch: zero keys and lengths of keys exclude each other.
    sum.zero_key_shares.resize(counts.zero_key_shares.size());
    for (std::size_t branch = 0; branch < counts.zero_key_shares.size(); ++branch) {
      sum.zero_key_shares[branch] += counts.zero_key_shares[branch] * static_cast<double>(of_part);
    }
    entries += of_part;
  }
  for (double& share : sum.zero_key_shares) { share /= static_cast<double>(entries); }
  return sum;
}

ResumableResult::ResumableResult(const ResolvedConfig& resolved, const BatchParts& parts, const EarlierRun& earlier,
                                 const Communicator& comm, const std::vector<std::pair<std::string, std::string>>& provenance)
    : comm_(comm),
      parts_(parts),
      steps_(parts.most_steps()),
      has_zero_keys_(resolved.config.pattern.ragged == Ragged::zero_keys),
      complete_(static_cast<std::size_t>(parts.count())) {
  const Config& config = resolved.config;
  const std::int64_t embed = config.layer ? config.layer->embed : 0;
  together(comm, [&] {
    if (comm.rank() != 0) { return; }
    if (earlier.parts == 0) {
      const std::int64_t count = parts.count();
      const auto size = static_cast<std::size_t>(count);
      std::vector<std::int64_t> first;
      std::vector<std::int64_t> entries;
      for (std::int64_t index = 0; index < count; ++index) {
        first.push_back(parts.part(index).first_batch);
        entries.push_back(parts.part(index).problem.batch);
      }
      const std::vector<std::int64_t> none(size);
      const std::vector<double> unknown(size, std::nan(""));
      const std::size_t branches = has_zero_keys_ ? config.pattern.branches.size() : 0;
      std::vector<ColumnTable> tables{
          {"/parts",
           {count},
           {{"first_entry", first},
            {"entries", entries},
            {"complete", none},
            {"finished_at", none},
            {"host", std::vector(size, std::string(kHostBytes, '\0'))},
            {"total_ms", unknown},
            {"tflops", unknown},
            {"uncovered", none},
            {"non_finite", none},
            {"memory_high_water", none},
            {"allocations_taken", none},
            {"allocations_reused", none},
            {"plans_made", none},
            {"plans_found", none}}},
          {"/parts", {count, 3}, {{"first_non_finite", std::vector<std::int64_t>(3 * size, -1)}}},
          {"/parts", {count, static_cast<std::int64_t>(branches)}, {{"zero_key_shares", std::vector<double>(size * branches)}}}};
      if (branches == 0) { tables.pop_back(); }
      const std::vector<std::vector<StepTiming>> timings(size * static_cast<std::size_t>(resolved.ranks),
                                                         std::vector<StepTiming>(static_cast<std::size_t>(steps_)));
      tables.push_back({"/timings", {count, resolved.ranks, steps_}, step_columns(timings).columns});
      ResultFile::create_resumable(config.output, config.force, config.problem, embed, result_tensors(config), tables,
                                   static_cast<std::int64_t>(branches), provenance);
    }
    file_ = ResultFile::resume(config.output, config.force, config.problem, embed, result_tensors(config));
    complete_ = std::get<std::vector<std::int64_t>>(file_->read_column("/parts/complete"));
    for (std::int64_t index = 0; index < parts.count(); ++index) {
      if (is_complete(index)) { file_->count_written(parts.part(index).problem.batch); }
    }
  });
  for (std::int64_t& part : complete_) { part = comm.max(comm.rank() == 0 ? part : 0); }
}

std::int64_t ResumableResult::parts_complete() const {
  return std::count_if(complete_.begin(), complete_.end(), [](std::int64_t part) { return part != 0; });
}

void ResumableResult::write(const Session& session, std::int64_t part, const PartReport& report) {
  write_rows(session, file_.get(), [&] {
    const auto put = [&](const char* column, const ColumnValues& values) {
      file_->write_row(std::string("/parts/") + column, part, values);
    };
    const RowCounts& counts = report.counts;
    put("finished_at", std::vector{seconds_since_1970()});
    put("host", std::vector{comm_.host()});
    put("total_ms", std::vector{report.ms});
    put("tflops", std::vector{report.tflops});
    put("uncovered", std::vector{counts.uncovered});
    put("non_finite", std::vector{counts.non_finite});
    put("first_non_finite", std::vector(counts.first_non_finite.begin(), counts.first_non_finite.end()));
    put("memory_high_water", std::vector{report.services.high_water});
    put("allocations_taken", std::vector{report.services.taken});
    put("allocations_reused", std::vector{report.services.reused});
    put("plans_made", std::vector{report.services.plans_made});
    put("plans_found", std::vector{report.services.plans_found});
    if (!counts.zero_key_shares.empty()) { put("zero_key_shares", counts.zero_key_shares); }
    std::vector<std::vector<StepTiming>> timings = report.timings;
    for (std::vector<StepTiming>& rank : timings) { rank.resize(static_cast<std::size_t>(steps_)); }
    for (const NamedColumn& column : step_columns(timings).columns) { file_->write_row("/timings/" + column.name, part, column.values); }
    file_->sync();
    put("complete", std::vector<std::int64_t>{1});
    file_->sync();
  });
  complete_[static_cast<std::size_t>(part)] = 1;
}

RowCounts ResumableResult::counts() const {
  RowCounts total;
  together(comm_, [&] {
    if (comm_.rank() != 0) { return; }
    const auto integers = [&](const char* column) { return std::get<std::vector<std::int64_t>>(file_->read_column(column)); };
    const std::vector<std::int64_t> uncovered = integers("/parts/uncovered");
    const std::vector<std::int64_t> non_finite = integers("/parts/non_finite");
    const std::vector<std::int64_t> first = integers("/parts/first_non_finite");
    std::vector<double> shares;
    if (has_zero_keys_) { shares = std::get<std::vector<double>>(file_->read_column("/parts/zero_key_shares")); }
    const std::size_t branches = shares.size() / uncovered.size();
    std::vector<std::pair<RowCounts, std::int64_t>> all;
    for (std::size_t part = 0; part < uncovered.size(); ++part) {
      RowCounts counts;
      counts.uncovered = uncovered[part];
      counts.non_finite = non_finite[part];
      std::copy_n(first.begin() + static_cast<std::ptrdiff_t>(3 * part), 3, counts.first_non_finite.begin());
      const auto begin = shares.begin() + static_cast<std::ptrdiff_t>(part * branches);
      counts.zero_key_shares.assign(begin, begin + static_cast<std::ptrdiff_t>(branches));
      all.emplace_back(std::move(counts), parts_.part(static_cast<std::int64_t>(part)).problem.batch);
    }
    total = sum_of(all);
  });
  total.non_finite = comm_.max(total.non_finite);
  return total;
}

void ResumableResult::commit(const RowCounts& counts) {
  together(comm_, [&] {
    if (comm_.rank() != 0) { return; }
    file_->write_counts(counts);
    file_->commit();
  });
}

}  // namespace annulus
