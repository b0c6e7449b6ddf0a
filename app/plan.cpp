// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/io/text_result.hpp>
#include <annulus/plan/key_order.hpp>
#include <annulus/session/job_plan.hpp>

#include "commands.hpp"
#include "csv.hpp"
#include "machine_file.hpp"
#include "report.hpp"
#include "standard_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace annulus::app {

namespace {

constexpr std::int64_t kLines = 16;        // ranks and steps that are told one by one
constexpr std::int64_t kMostListed = 256;  // ranks whose links, up to their square, are listed one by one

/// ", kernel K" of a resolved configuration, where the backend has several.
std::string kernel_text(const Config& config) {
  return config.kernel == KernelKind::automatic ? std::string() : fmt::format(", kernel {}", to_string(config.kernel));
}

std::string words_of(const JobWay& way) {
  return fmt::format("{}partition {}, schedule {}", way.grid.rings() > 1 ? fmt::format("grid {}, ", to_string(way.grid)) : std::string(),
                     to_string(way.partition), to_string(way.schedule));
}

/// All that is found out about one number of ranks.
struct Plan {
  ResolvedConfig resolved;
  JobPlan job;
  std::optional<Prediction> prediction;
  std::vector<JobWay> ways;   ///< the fastest first; empty without a machine
  std::int64_t longest = -1;  ///< tokens; -1: unknown
  std::string refusal;        ///< of a job that cannot be planned, or does not fit; empty of one that can run
};

double tflops_per_rank(const Plan& plan) { return annulus::tflops_per_rank(plan.job, *plan.prediction); }

/// Whether the attention alone is timed.
bool times_attention_alone(const Plan& plan) { return plan.resolved.layer != nullptr; }

std::optional<Machine> machine_of(const Config& config) {
  if (config.machine.empty()) { return std::nullopt; }
  return read_machine(config.machine);
}

/// Adds what a machine says: times, the fastest way, the longest sequence.
void look_at_machine(Plan& plan, const Config& asked, const Machine& machine) {
  plan.prediction = predict_job(plan.resolved, machine);
  plan.ways = compare_ways(asked, machine);
  if (machine.memory_bytes == 0) { return; }
  if (asked.input.empty()) { plan.longest = longest_seq_len(asked, plan.resolved, machine); }
  if (plan.job.largest_memory > machine.memory_bytes) {
    plan.refusal = fmt::format("rank {} needs {} of {}", plan.job.largest_rank, human_bytes(plan.job.largest_memory),
                               human_bytes(machine.memory_bytes));
  }
}

Json json_of(const RankOfJob& rank, std::int64_t ranks) {
  const PlanCost& cost = rank.figures->cost;
  Json json{{"rank", rank.rank},
            {"rows", rank.figures->sizes.local_rows},
            {"steps", cost.steps},
            {"memory", rank.memory_total},
            {"bytes_sent", count_in_json(cost.bytes_sent)},
            {"bytes_received", count_in_json(cost.bytes_received)},
            {"flops", rank.flops},
            {"peers", cost.links.size()},
            {"busiest_link", count_in_json(rank.busiest_link)}};
  if (ranks > kMostListed) { return json; }
  Json& links = json["links"] = Json::array();
  for (const LinkBytes& link : cost.links) {
    links.push_back(
        {{"peer", rank.first_rank + link.peer}, {"sent", count_in_json(link.sent)}, {"received", count_in_json(link.received)}});
  }
  return json;
}

Json json_of(const Prediction& prediction, double tflops) {
  return {{"total_ms", prediction.total_ms},
          {"compute_ms", prediction.compute_ms},
          {"communication_ms", prediction.communication_ms},
          {"exposed_ms", prediction.exposed_ms},
          {"tflops_per_rank", tflops},
          {"slowest_rank", prediction.slowest_rank},
          {"ranks_on_the_clock", prediction.interpreted},
          {"steps", to_json({prediction.steps}).front()}};
}

Json json_of(const JobWay& way) {
  Json json{{"grid", to_string(way.grid)}, {"partition", to_string(way.partition)}, {"schedule", to_string(way.schedule)}};
  if (way.refused.empty()) {
    json["total_ms"] = way.total_ms;
  } else {
    json["refused"] = way.refused;
  }
  return json;
}

/// What is said of a configuration before its ranks.
Json heading_json(const ResolvedConfig& resolved) {
  const Config& config = resolved.config;
  const Grid& grid = config.places;
  Json json{{"problem", to_json(config.problem)}, {"pattern", describe(config.pattern)}, {"ranks", resolved.ranks}};
  json["grid"] = {{"batch", grid.batch}, {"heads", grid.heads}, {"seq", grid.seq}};
  json["backend"] = fmt::format("{}{}", to_string(config.backend), kernel_text(config));
  json["ways"] = ways_text(config);
  json["key_order"] =
      describe_key_order(config.problem, config.pattern, Partition(config.partition, config.problem.seq_len, grid.seq), routing_of(config));
  if (resolved.layer) { json["layer"] = to_json(*config.layer); }
  return json;
}

void add_job(Json& json, const Plan& plan, const Machine* machine) {
  const JobPlan& job = plan.job;
  if (plan.resolved.layer) {
    const LayerCost& layer = job.layer_of_largest;
    json["layer"]["weight_bytes"] = layer.weight_bytes;
    json["layer"]["activation_bytes"] = layer.activation_bytes;
    json["layer"]["scratch_bytes"] = layer.scratch_bytes;
    json["layer"]["flops_of_largest"] = layer.flops;
  }
  json["bytes_sent"] = count_in_json(job.bytes_sent);
  json["flops"] = job.flops;
  json["largest_memory"] = job.largest_memory;
  if (machine == nullptr) { return; }
  json["machine"] = machine->name;
  json["bytes_inside_hosts"] = count_in_json(job.bytes_sent - job.bytes_between);
  json["bytes_between_hosts"] = count_in_json(job.bytes_between);
  json["predicted"] = json_of(*plan.prediction, tflops_per_rank(plan));
  Json& ways = json["fastest"] = Json::array();
  for (const JobWay& way : plan.ways) { ways.push_back(json_of(way)); }
  if (plan.longest >= 0) { json["longest_seq_len"] = plan.longest; }
  if (!plan.refusal.empty()) { json["refused"] = plan.refusal; }
}

void say_heading(const ResolvedConfig& resolved) {
  const Config& config = resolved.config;
  const Grid& grid = config.places;
  say("{}\n{}\n{} ranks{}, backend {}{}\n{}\n", describe(config.problem), describe(config.pattern), resolved.ranks,
      grid.rings() == 1 ? std::string() : fmt::format(" as {}", to_string(grid)), to_string(config.backend), kernel_text(config),
      ways_text(config));
  say("{}\n", describe_key_order(config.problem, config.pattern, Partition(config.partition, config.problem.seq_len, grid.seq),
                                 routing_of(config)));
  if (resolved.layer) { say("{}\n", describe(*config.layer)); }
  say("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10}\n", "rank", "rows", "steps", "memory", "inputs+out",
      "partials", "slots", "sent B", "received B", "peers", "GFLOP");
}

void say_rank(const RankOfJob& rank) {
  if (rank.rank >= kLines) { return; }
  const MemoryPlan& memory = rank.memory;
  const PlanCost& cost = rank.figures->cost;
  say("{:>6} {:>10} {:>6} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14} {:>6} {:>10.3f}\n", rank.rank, rank.figures->sizes.local_rows,
      cost.steps, human_bytes(rank.memory_total), human_bytes(memory.inputs + memory.outputs + memory.gradients),
      human_bytes(memory.partials), human_bytes(memory.slots), cost.bytes_sent, cost.bytes_received, cost.links.size(), rank.flops / 1e9);
}

void say_steps(const Prediction& prediction) {
  say("{:>6} {:>12} {:>12} {:>12} {:>14} {:>14}\n", "step", "compute ms", "comm ms", "exposed ms", "sent B", "received B");
  for (std::int64_t step = 0; step < std::min<std::int64_t>(kLines, std::ssize(prediction.steps)); ++step) {
    const StepTiming& timing = prediction.steps[static_cast<std::size_t>(step)];
    say("{:>6} {:>12.3f} {:>12.3f} {:>12.3f} {:>14} {:>14}\n", step, timing.compute_ms, timing.communication_ms, timing.exposed_ms,
        timing.bytes_sent, timing.bytes_received);
  }
  const std::int64_t more = std::ssize(prediction.steps) - kLines;
  if (more > 0) { say("   ... {} more steps; --json has all of them\n", more); }
}

void say_ways(const Plan& plan) {
  const JobWay& best = plan.ways.front();
  const auto possible = std::count_if(plan.ways.begin(), plan.ways.end(), [](const JobWay& way) { return way.refused.empty(); });
  say("fastest of {} ways: {}, {:.3f} ms", possible, words_of(best), best.total_ms);
  if (possible > 1) { say("; then {}, {:.3f} ms", words_of(plan.ways[1]), plan.ways[1].total_ms); }
  const double gained = 1 - best.total_ms / plan.prediction->total_ms;
  say("{}\n", gained > 0.005 ? fmt::format("; {:.0f}% less than the plan above", 100 * gained) : std::string("; as planned above"));
  for (const JobWay& way : plan.ways) {
    if (!way.refused.empty()) { say("refused: {}: {}\n", words_of(way), way.refused); }
  }
}

void say_job(const Plan& plan, const Machine* machine, const std::string& file) {
  const JobPlan& job = plan.job;
  if (job.ranks > kLines) { say("   ... {} more ranks; --json has all of them\n", job.ranks - kLines); }
  if (plan.resolved.layer) {
    const LayerCost& layer = job.layer_of_largest;
    say("layer of the largest rank: {} of weights, {} of activations, {} of scratch, {:.4g} GFLOP; memory and GFLOP above hold it\n",
        human_bytes(layer.weight_bytes), human_bytes(layer.activation_bytes), human_bytes(layer.scratch_bytes), layer.flops / 1e9);
  }
  say("all ranks: {} bytes sent, at most {} over one link; {:.4g} GFLOP; largest memory {} (without the backend's workspace)\n",
      job.bytes_sent, job.busiest_link, job.flops / 1e9, human_bytes(job.largest_memory));
  if (machine == nullptr) { return; }
  const Prediction& prediction = *plan.prediction;
  say("machine: {} ({})\n", machine->name, file);
  say("traffic: {} bytes inside hosts, {} between {} hosts\n", job.bytes_sent - job.bytes_between, job.bytes_between,
      machine->host_of(job.ranks - 1) + 1);
  say("predicted: {:.3f} ms of rank {}, the slowest{}: {:.3f} compute, {:.3f} exposed communication; {:.4g} TFLOP/s a rank; {} of {} ranks "
      "ran on the clock\n",
      prediction.total_ms, prediction.slowest_rank, times_attention_alone(plan) ? ", without the layer around the attention" : "",
      prediction.compute_ms, prediction.exposed_ms, tflops_per_rank(plan), prediction.interpreted, prediction.ranks);
  say_steps(prediction);
  say_ways(plan);
  if (plan.longest >= 0) { say("longest sequence that fits in {}: {} tokens\n", human_bytes(machine->memory_bytes), plan.longest); }
  if (!plan.refusal.empty()) { say("refused: {}\n", plan.refusal); }
}

/// The columns of several numbers of ranks: of the table and, with more digits, of the CSV file.
void say_table_heading(bool timed) {
  say("{:>6} {:>16} {:>12} {:>10} {:>12} {:>16}", "ranks", "grid", "partition", "schedule", "memory", "sent B");
  if (timed) {
    say(" {:>16} {:>12} {:>12} {:>12} {:>14} {:>14}", "between hosts B", "ms", "compute ms", "exposed ms", "TFLOP/s/rank", "longest");
  }
  say("\n");
}

void say_table_row(const Plan& plan, bool is_planned) {
  if (!is_planned) {
    say("{:>6} refused: {}\n", plan.job.ranks, plan.refusal);
    return;
  }
  const Config& config = plan.resolved.config;
  const JobPlan& job = plan.job;
  say("{:>6} {:>16} {:>12} {:>10} {:>12} {:>16}", job.ranks, config.places.rings() == 1 ? "-" : to_string(config.places),
      to_string(config.partition), to_string(config.schedule), human_bytes(job.largest_memory), job.bytes_sent);
  if (plan.prediction) {
    say(" {:>16} {:>12.3f} {:>12.3f} {:>12.3f} {:>14.4g} {:>14}", job.bytes_between, plan.prediction->total_ms, plan.prediction->compute_ms,
        plan.prediction->exposed_ms, tflops_per_rank(plan), plan.longest < 0 ? "-" : fmt::format("{}", plan.longest));
  }
  say("{}\n", plan.refusal.empty() ? std::string() : fmt::format(" refused: {}", plan.refusal));
  if (!plan.ways.empty() && plan.ways.front().total_ms < 0.995 * plan.prediction->total_ms) {
    say("       {:.3f} ms with {}\n", plan.ways.front().total_ms, words_of(plan.ways.front()));
  }
}

/// What a column holds of a plan.
template <class Get>
NamedColumn column(const char* name, const std::vector<Plan>& plans, Get get) {
  std::vector<decltype(get(plans.front()))> values;
  for (const Plan& plan : plans) { values.push_back(get(plan)); }
  return {name, std::move(values)};
}

std::vector<NamedColumn> columns_of(const std::vector<Plan>& plans, const Machine* machine) {
  const auto number = [](Int128 count) { return static_cast<double>(count); };
  std::vector<NamedColumn> columns{
      column("ranks", plans, [](const Plan& p) { return p.job.ranks; }),
      column("seq-len", plans, [](const Plan& p) { return p.resolved.config.problem.seq_len; }),
      column("grid", plans, [](const Plan& p) { return to_string(p.resolved.config.places); }),
      column("partition", plans, [](const Plan& p) { return std::string(to_string(p.resolved.config.partition)); }),
      column("schedule", plans, [](const Plan& p) { return std::string(to_string(p.resolved.config.schedule)); }),
      column("memory", plans, [](const Plan& p) { return p.job.largest_memory; }),
      column("bytes_sent", plans, [&](const Plan& p) { return number(p.job.bytes_sent); }),
      column("flops", plans, [](const Plan& p) { return p.job.flops; })};
  if (machine != nullptr) {
    const auto predicted = [&](const char* name, double Prediction::* field) {
      columns.push_back(column(name, plans, [field](const Plan& p) { return p.prediction ? (*p.prediction).*field : 0.0; }));
    };
    columns.push_back(column("hosts", plans, [&](const Plan& p) { return machine->host_of(p.job.ranks - 1) + 1; }));
    columns.push_back(column("bytes_between_hosts", plans, [&](const Plan& p) { return number(p.job.bytes_between); }));
    predicted("predicted_ms", &Prediction::total_ms);
    predicted("predicted_compute_ms", &Prediction::compute_ms);
    predicted("predicted_exposed_ms", &Prediction::exposed_ms);
    columns.push_back(column("predicted_tflops_per_rank", plans, [](const Plan& p) { return p.prediction ? tflops_per_rank(p) : 0.0; }));
    columns.push_back(column("fastest_ms", plans, [](const Plan& p) { return p.ways.empty() ? 0.0 : p.ways.front().total_ms; }));
    columns.push_back(column("fastest", plans, [](const Plan& p) { return p.ways.empty() ? std::string() : words_of(p.ways.front()); }));
    columns.push_back(column("longest_seq_len", plans, [](const Plan& p) { return p.longest; }));
  }
  columns.push_back(column("refused", plans, [](const Plan& p) { return p.refusal; }));
  return columns;
}

/// Plans one number of ranks, telling of each rank.
Plan plan_of(Config asked, std::int64_t ranks, const Machine* machine, const std::function<void(const ResolvedConfig&)>& begin,
             const std::function<void(const RankOfJob&)>& visit) {
  asked.ranks = ranks;
  Plan plan;
  plan.resolved = resolve_without_job(asked);
  if (machine != nullptr) {
    // Before anything is printed: there is no use in a machine that knows nothing of the dtype.
    ANNULUS_EXPECTS(!plan.resolved.config.gradients, "--machine predicts no time of a backward pass, and --gradients asks for one");
    const Problem& problem = plan.resolved.config.problem;
    static_cast<void>(machine->flops_per_s(problem.dtype, problem.head_dim, kernels::Mask::none, 1, 1));
  }
  begin(plan.resolved);
  plan.job = plan_job(plan.resolved, machine, visit);
  if (machine != nullptr) { look_at_machine(plan, asked, *machine); }
  return plan;
}

/// A line for each number of ranks, or a list of JSON objects.
std::vector<Plan> plan_several(const Invocation& invocation, const Machine* machine) {
  const Config& asked = invocation.config;
  std::vector<Plan> plans;
  Json list = Json::array();
  bool headed = invocation.json;
  for (const std::int64_t ranks : asked.rank_counts) {
    Json json;
    bool is_planned = true;
    try {
      plans.push_back(plan_of(
          asked, ranks, machine,
          [&](const ResolvedConfig& resolved) {
            json = heading_json(resolved);
            if (std::exchange(headed, true)) { return; }
            say("{}\n{}\n", describe(resolved.config.problem), describe(resolved.config.pattern));
            if (machine != nullptr) { say("machine: {} ({})\n", machine->name, asked.machine); }
            say_table_heading(machine != nullptr);
          },
          [](const RankOfJob& /*rank*/) {}));
      add_job(json, plans.back(), machine);
    } catch (const InvalidArgument& error) {
      // What one number of ranks cannot do, another may.
      is_planned = false;
      plans.emplace_back().refusal = error.what();
      plans.back().job.ranks = ranks;
      json = Json{{"ranks", ranks}, {"refused", error.what()}};
    }
    list.push_back(std::move(json));
    if (!invocation.json) { say_table_row(plans.back(), is_planned); }
    flush_output();
  }
  if (invocation.json) { say("{}\n", list.dump(2)); }
  return plans;
}

/// Every rank by itself, then the job.
std::vector<Plan> plan_one(const Invocation& invocation, const Machine* machine) {
  const Config& asked = invocation.config;
  Json json;
  Json per_rank = Json::array();
  std::vector<Plan> plans;
  plans.push_back(plan_of(
      asked, asked.ranks, machine,
      [&](const ResolvedConfig& resolved) {
        if (invocation.json) {
          json = heading_json(resolved);
        } else {
          say_heading(resolved);
        }
      },
      [&](const RankOfJob& rank) {
        if (invocation.json) {
          per_rank.push_back(json_of(rank, asked.ranks));
        } else {
          say_rank(rank);
        }
      }));
  if (!invocation.json) {
    say_job(plans.back(), machine, asked.machine);
    return plans;
  }
  add_job(json, plans.back(), machine);
  json["per_rank"] = std::move(per_rank);
  say("{}\n", json.dump(2));
  return plans;
}

}  // namespace

ExitCode execute_plan(const Invocation& invocation) {
  const Config& asked = invocation.config;
  const std::optional<Machine> known = machine_of(asked);
  const Machine* const machine = known ? &*known : nullptr;
  std::unique_ptr<TextResult> csv;
  if (!asked.csv.empty()) { csv = std::make_unique<TextResult>(asked.csv, asked.force); }
  const std::vector<Plan> plans = asked.rank_counts.size() > 1 ? plan_several(invocation, machine) : plan_one(invocation, machine);
  if (csv) { csv->write(csv_of(columns_of(plans, machine), plans.size())); }
  return ExitCode::passed;
}

}  // namespace annulus::app
