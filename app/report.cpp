// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <annulus/core/build_info.hpp>
#include <annulus/core/provenance.hpp>

#include "config_file.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <ctime>
#include <iterator>
#include <limits>

namespace annulus::app {

std::string human_bytes(std::int64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < std::size(kUnits)) {
    value /= 1024.0;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.2f} {}", value, kUnits[unit]);
}

std::string describe(const Problem& problem) {
  std::string lengths;
  if (!problem.kv_lengths.empty()) {
    const auto [least, most] = std::minmax_element(problem.kv_lengths.begin(), problem.kv_lengths.end());
    lengths = *least == *most ? fmt::format(", kv-lengths {}", *least) : fmt::format(", kv-lengths {} to {}", *least, *most);
  }
  if (problem.extra_keys > 0) { lengths += fmt::format(", extra-keys {}", problem.extra_keys); }
  const kernels::Dropout& dropout = problem.dropout;
  if (dropout.probability > 0) { lengths += fmt::format(", dropout {} (seed {})", dropout.probability, dropout.seed); }
  return fmt::format("batch {}, seq-len {}, heads {}, kv-heads {}, head-dim {}, {}{}{}, scale {:.6g}", problem.batch, problem.seq_len,
                     problem.heads, problem.kv_heads, problem.head_dim, to_string(problem.dtype), problem.causal ? ", causal" : "", lengths,
                     problem.scale);
}

std::string describe(const Pattern& pattern) {
  std::string lengths;
  std::string rates;
  for (const Branch& branch : pattern.branches) {
    lengths += fmt::format("{}{}", lengths.empty() ? "" : ",", branch.segment_length);
    rates += fmt::format("{}{}", rates.empty() ? "" : ",", branch.dilation_rate);
  }
  return fmt::format("segments {}, rates {}, offset {}, head-split {}, mixing {}{}", lengths, rates, to_string(pattern.offset),
                     to_string(pattern.head_split), to_string(pattern.mixing), pattern.scale_by_branches ? ", scaled by branches" : "") +
         (pattern.order == SequenceOrder::linear
              ? std::string()
              : fmt::format(", order {} (another operator: the sequence is permuted)", to_string(pattern.order)));
}

std::string describe(const Layer& layer) {
  std::string text = fmt::format("layer: embed {}", layer.embed);
  const auto add = [&](bool wanted, const std::string& part) {
    if (wanted) { text += ", " + part; }
  };
  add(layer.kdim != layer.embed, fmt::format("kdim {}", layer.kdim));
  add(layer.vdim != layer.embed, fmt::format("vdim {}", layer.vdim));
  add(layer.bias, "bias");
  add(layer.qk_norm != Norm::none, fmt::format("qk-norm {}", to_string(layer.qk_norm)));
  add(layer.rotary != RotaryPairs::none, fmt::format("rotary {} (base {})", to_string(layer.rotary), layer.rotary_base));
  add(layer.output_norm != Norm::none, fmt::format("output-norm {}", to_string(layer.output_norm)));
  add(layer.gate != Gate::none, fmt::format("gate {}", to_string(layer.gate)));
  add(layer.bias_kv, "bias-kv");
  add(layer.zero_tokens > 0, fmt::format("zero-tokens {}", layer.zero_tokens));
  return text;
}

Json count_in_json(Int128 count) {
  constexpr Int128 kExact = std::numeric_limits<std::int64_t>::max();
  return count <= kExact ? Json(static_cast<std::int64_t>(count)) : Json(static_cast<double>(count));
}

Json to_json(const Problem& problem) {
  Json json{{"batch", problem.batch},       {"seq-len", problem.seq_len},        {"heads", problem.heads},   {"kv-heads", problem.kv_heads},
            {"head-dim", problem.head_dim}, {"dtype", to_string(problem.dtype)}, {"causal", problem.causal}, {"scale", problem.scale}};
  if (!problem.kv_lengths.empty()) { json["kv-lengths"] = problem.kv_lengths; }
  if (problem.extra_keys > 0) { json["extra-keys"] = problem.extra_keys; }
  if (problem.dropout.probability > 0) {
    json["dropout"] = problem.dropout.probability;
    json["dropout-seed"] = problem.dropout.seed;
  }
  return json;
}

Json to_json(const Layer& layer) {
  return {{"embed", layer.embed},
          {"kdim", layer.kdim},
          {"vdim", layer.vdim},
          {"bias", layer.bias},
          {"qk-norm", to_string(layer.qk_norm)},
          {"output-norm", to_string(layer.output_norm)},
          {"norm-epsilon", layer.norm_epsilon},
          {"rotary", to_string(layer.rotary)},
          {"rotary-base", layer.rotary_base},
          {"gate", to_string(layer.gate)},
          {"gate-temperature", layer.gate_temperature},
          {"bias-kv", layer.bias_kv},
          {"zero-tokens", layer.zero_tokens}};
}

namespace {

/// "dq", as the dataset is named.
std::string gradient_name(Tensor tensor) { return tensor == Tensor::q ? "dq" : (tensor == Tensor::k ? "dk" : "dv"); }

}  // namespace

Json to_json(const CaseReport& report) {
  Json json{{"name", report.name}, {"passed", report.verdict.passed}};
  json["rows"] = report.rows_checked;
  json["rms_error"] = report.verdict.rms_error;
  json["plain_rms_error"] = report.verdict.plain_rms_error;
  json["ratio"] = report.verdict.ratio;
  json["limit"] = report.verdict.limit;
  json["max_error"] = report.sums.max_error;
  json["worst"] = report.sums.worst;
  json["max_lse_error"] = report.sums.max_lse_error;
  json["uncovered"] = report.sums.uncovered;
  for (const GradientReport& gradient : report.gradients) {
    json["gradients"][gradient_name(gradient.tensor)] = {
        {"rms_error", gradient.verdict.rms_error}, {"plain_rms_error", gradient.verdict.plain_rms_error},
        {"ratio", gradient.verdict.ratio},         {"limit", gradient.verdict.limit},
        {"max_error", gradient.sums.max_error},    {"worst", gradient.sums.worst}};
  }
  if (!report.gradients.empty()) { json["gradients"]["kv_heads"] = report.gradient_kv_heads; }
  if (!report.flags.empty()) { json["flags"] = report.flags; }
  if (!report.verdict.passed) { json["reason"] = report.verdict.reason; }
  return json;
}

std::string line_of(const CaseReport& report) {
  const Verdict& verdict = report.verdict;
  std::string gradients;
  for (const GradientReport& gradient : report.gradients) {
    gradients += fmt::format(" | {} {:.1e} (limit {:.1e}, {:.2f} x plain)", gradient_name(gradient.tensor), gradient.verdict.rms_error,
                             gradient.verdict.limit, gradient.verdict.ratio);
  }
  return fmt::format("{} {} | rows {}/{} | rms {:.2e} (limit {:.2e}, {:.2f} x plain) | max {:.2e} at [{},{},{},{}] | lse {:.1e}{}{}",
                     verdict.passed ? "PASS" : "FAIL", report.name, report.rows_checked, report.rows_total, verdict.rms_error,
                     verdict.limit, verdict.ratio, report.sums.max_error, report.sums.worst[0], report.sums.worst[1], report.sums.worst[2],
                     report.sums.worst[3], report.sums.max_lse_error, gradients,
                     verdict.passed ? "" : "\n     " + verdict.reason + "\n     " + report.flags);
}

std::string ways_text(const Config& config) {
  const auto because = [](const std::string& reason) { return reason.empty() ? std::string() : fmt::format(" (auto: {})", reason); };
  const std::string grid =
      config.grid_reason.empty() ? std::string() : fmt::format("grid {}{}; ", to_string(config.places), because(config.grid_reason));
  return fmt::format("{}partition {}, schedule {}{}", grid, to_string(config.partition), to_string(config.schedule),
                     because(config.ways_reason));
}

std::string line_of(const RowCounts& counts) {
  return fmt::format("{} rows of the result are not finite, the first at [{}] (batch, head, row)", counts.non_finite,
                     fmt::join(counts.first_non_finite, ","));
}

std::string zero_keys_line(const RowCounts& counts) {
  std::vector<std::string> shares;
  for (const double share : counts.zero_key_shares) { shares.push_back(fmt::format("{:.2f}%", 100 * share)); }
  return fmt::format("keys of zeros took of the softmax, by branch: {}", fmt::join(shares, ", "));
}

Json to_json(const std::vector<std::vector<StepTiming>>& timings) {
  Json ranks = Json::array();
  for (const auto& steps : timings) {
    Json list = Json::array();
    for (const StepTiming& t : steps) {
      Json& step = list.emplace_back(Json::object());
      for (const StepNumber& number : kStepNumbers) {
        std::visit([&](auto field) { step[std::string(number.name)] = t.*field; }, number.field);
      }
    }
    ranks.push_back(std::move(list));
  }
  return ranks;
}

std::string host_lines(const Communicator& comm, std::string_view backend) {
  std::string text;
  for (const std::string& line : comm.all_gather(fmt::format("{} {}", comm.name(), backend))) { text += line + '\n'; }
  return text;
}

std::string stopped_line(const StopRequest& stop, std::int64_t done, std::int64_t wanted, std::string_view what) {
  return fmt::format("stopped by {} after {} of {} {}{}", describe(stop.cause()), done, wanted, what, wanted == 1 ? "" : "s");
}

std::vector<std::pair<std::string, std::string>> provenance(const Invocation& invocation, const Config& config) {
  const BuildInfo& build = build_info();
  std::vector<std::pair<std::string, std::string>> entries;
  entries.emplace_back("config", to_toml(config, invocation.command));
  entries.emplace_back("command_line", invocation.command_line);
  entries.emplace_back("written", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))));
  entries.emplace_back("version", std::string(build.version));
  entries.emplace_back("git", std::string(build.git));
  entries.emplace_back("compiler", fmt::format("{} {}", build.compiler, build.build_type));
  entries.emplace_back("mpi", mpi_library_version());
  entries.emplace_back("hdf5", std::string(build.hdf5));
  if (!build.cuda.empty()) { entries.emplace_back("cuda", std::string(build.cuda)); }
  if (!build.nccl.empty()) { entries.emplace_back("nccl", std::string(build.nccl)); }
  if (config.share_gpu) { entries.emplace_back("timings", "meaningless: ranks share a GPU"); }
  std::string environment;
  for (const auto& [name, value] : recorded_environment()) { environment += name + "=" + value + "\n"; }
  entries.emplace_back("environment", environment);
  return entries;
}

}  // namespace annulus::app
