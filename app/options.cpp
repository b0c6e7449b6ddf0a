// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <annulus/core/error.hpp>
#include <annulus/core/text.hpp>

#include "sweep.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace annulus::app {

namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

const std::vector<Command> kComputing{Command::run, Command::check, Command::bench};
const std::vector<Command> kPlanning{Command::run, Command::check, Command::bench, Command::plan};
const std::vector<Command> kShaping{Command::run, Command::check, Command::bench, Command::plan, Command::generate};

/// An integer in [low, high], kept in the field that `field` names.
template <class Field>
Option integer(std::string_view name, Scope scope, std::string help, std::vector<Command> commands, std::int64_t low, std::int64_t high,
               Field field, std::int64_t unset = -1) {
  Option option{name, scope, std::move(help), ValueKind::integer, std::move(commands), {}, {}};
  option.set = [name, low, high, field](Draft& draft, const Value& value) {
    const auto number = std::get<std::int64_t>(value);
    ANNULUS_EXPECTS(number >= low, "--{} {} is below {}", name, number, low);
    ANNULUS_EXPECTS(number <= high, "--{} {} is above {}", name, number, high);
    field(draft.config) = static_cast<std::remove_reference_t<decltype(field(draft.config))>>(number);
  };
  option.get = [field, unset](const Config& config, Value& value) {
    Config copy = config;
    const auto number = static_cast<std::int64_t>(field(copy));
    value = number;
    return number != unset;
  };
  return option;
}

template <class Enum, class Field>
Option choice(std::string_view name, Scope scope, const std::string& help, std::vector<Command> commands, Field field) {
  Option option{name, scope, help + " (" + names_of<Enum>() + ")", ValueKind::text, std::move(commands), {}, {}};
  option.set = [name, field](Draft& draft, const Value& value) {
    const auto& text = std::get<std::string>(value);
    const std::optional<Enum> parsed = from_string<Enum>(text);
    ANNULUS_EXPECTS(parsed.has_value(), "--{} {} is not one of {}", name, text, names_of<Enum>());
    field(draft.config) = *parsed;
  };
  option.get = [field](const Config& config, Value& value) {
    Config copy = config;
    value = std::string(to_string(field(copy)));
    return true;
  };
  for (const auto& entry : EnumNames<Enum>::values) { option.choices.push_back(entry.second); }
  return option;
}

template <class Field>
Option boolean(std::string_view name, Scope scope, std::string help, std::vector<Command> commands, Field field) {
  Option option{name, scope, std::move(help), ValueKind::boolean, std::move(commands), {}, {}};
  option.set = [field](Draft& draft, const Value& value) { field(draft.config) = std::get<bool>(value); };
  option.get = [field](const Config& config, Value& value) {
    Config copy = config;
    value = static_cast<bool>(field(copy));
    return true;
  };
  return option;
}

template <class Field>
Option path(std::string_view name, Scope scope, std::string help, std::vector<Command> commands, Field field) {
  Option option{name, scope, std::move(help), ValueKind::text, std::move(commands), {}, {}};
  option.set = [name, field](Draft& draft, const Value& value) {
    const auto& text = std::get<std::string>(value);
    ANNULUS_EXPECTS(!text.empty(), "--{} is empty", name);
    // A name is told in JSON, TOML and HDF5 strings, which are UTF-8; the system would cut it at a NUL.
    ANNULUS_EXPECTS(is_utf8(text) && text.find('\0') == std::string::npos, "--{} '{}' is not a file name in UTF-8", name, printable(text));
    field(draft.config) = text;
  };
  option.get = [field](const Config& config, Value& value) {
    Config copy = config;
    value = field(copy);
    return !field(copy).empty();
  };
  option.names_file = true;
  return option;
}

Option list(std::string_view name, std::string help, std::vector<std::int64_t> Draft::* field, std::int64_t Branch::* member) {
  Option option{name, Scope::pattern, std::move(help), ValueKind::integers, kPlanning, {}, {}};
  option.set = [name, field](Draft& draft, const Value& value) {
    const auto& numbers = std::get<std::vector<std::int64_t>>(value);
    ANNULUS_EXPECTS(!numbers.empty(), "--{} is empty", name);
    for (const std::int64_t number : numbers) { ANNULUS_EXPECTS(number >= 1, "--{} {} is below 1", name, number); }
    draft.*field = numbers;
  };
  option.get = [member](const Config& config, Value& value) {
    std::vector<std::int64_t> numbers;
    for (const Branch& branch : config.pattern.branches) { numbers.push_back(branch.*member); }
    value = numbers;
    return !numbers.empty();
  };
  return option;
}

Option kv_lengths_option() {
  Option option{"kv-lengths",
                Scope::problem,
                "keys of a batch entry from this token on are seen by no query, one number for each entry; by default the input's "
                "/kv_lengths, else none are hidden",
                ValueKind::integers,
                kShaping,
                {},
                {}};
  option.set = [](Draft& draft, const Value& value) {
    draft.config.problem.kv_lengths = std::get<std::vector<std::int64_t>>(value);
    ANNULUS_EXPECTS(!draft.config.problem.kv_lengths.empty(), "--kv-lengths is empty");
  };
  option.get = [](const Config& config, Value& value) {
    value = config.problem.kv_lengths;
    return !config.problem.kv_lengths.empty();
  };
  return option;
}

Option scale_option() {
  Option option{"scale",
                Scope::problem,
                "factor of <q, k>; by default the input's attribute `scale`, else 1/sqrt(head-dim)",
                ValueKind::real,
                kPlanning,
                {},
                {}};
  option.set = [](Draft& draft, const Value& value) { draft.config.scale = std::get<double>(value); };
  option.get = [](const Config& config, Value& value) {
    value = config.scale.value_or(0.0);
    return config.scale.has_value();
  };
  return option;
}

Option dropout_option() {
  Option option{"dropout",
                Scope::problem,
                "share of the probabilities that are dropped before they meet V, the others scaled up for it, by draws that no number of "
                "ranks changes; 0 to below 1, on backends cpu and reference",
                ValueKind::real,
                kPlanning,
                {},
                {}};
  option.set = [](Draft& draft, const Value& value) { draft.config.problem.dropout.probability = std::get<double>(value); };
  option.get = [](const Config& config, Value& value) {
    value = config.problem.dropout.probability;
    return true;
  };
  return option;
}

Option dtype_option() {
  Option option{"dtype",
                Scope::problem,
                "element type (" + names_of<DType>() + "); converts an input file once on reading",
                ValueKind::text,
                kShaping,
                {},
                {}};
  option.set = [](Draft& draft, const Value& value) {
    const auto& text = std::get<std::string>(value);
    draft.config.dtype = from_string<DType>(text);
    ANNULUS_EXPECTS(draft.config.dtype.has_value(), "--dtype {} is not one of {}", text, names_of<DType>());
  };
  option.get = [](const Config& config, Value& value) {
    if (config.dtype) { value = std::string(to_string(*config.dtype)); }
    return config.dtype.has_value();
  };
  return option;
}

/// A span of time, 0 for none, kept in `field`.
Option seconds(std::string_view name, Scope scope, std::string help, std::vector<Command> commands, double Config::* field) {
  Option option{name, scope, std::move(help), ValueKind::real, std::move(commands), {}, {}};
  option.set = [name, field](Draft& draft, const Value& value) {
    const double given = std::get<double>(value);
    ANNULUS_EXPECTS(given >= 0, "--{} {} is negative", name, given);
    draft.config.*field = given;
  };
  option.get = [field](const Config& config, Value& value) {
    value = config.*field;
    return true;
  };
  return option;
}

Option grid_option() {
  Option option{"grid",
                Scope::execution,
                "spreads the ranks over batch entries, heads and tokens: batch=B,heads=H,seq=S, each 1 if left out, seq what is left, "
                "or auto; KV blocks travel along seq only",
                ValueKind::text,
                kPlanning,
                {},
                {}};
  option.set = [](Draft& draft, const Value& value) { draft.config.grid = grid_from(std::get<std::string>(value)); };
  option.get = [](const Config& config, Value& value) {
    value = to_string(config.grid);
    return config.grid != Grid();
  };
  return option;
}

Option kv_heads_option() {
  Option option = integer("kv-heads", Scope::problem, "key and value heads, a divisor of heads; by default as many as heads", kShaping, 1,
                          kMax, [](Config& c) -> auto& { return c.problem.kv_heads; });
  option.get = [](const Config& config, Value& value) {
    value = config.problem.kv_heads;
    return config.sweep.empty() || config.given.contains("kv-heads");  // a sweep over heads takes the default along
  };
  return option;
}

Option sweep_option() {
  Option option{
      "sweep",
      Scope::bench,
      "time one row for each value of another option, which must be a single value of the problem, pattern or execution; integers also "
      "as BEGIN..END*FACTOR or BEGIN..END+STEP; several: every combination, the last one fastest",
      ValueKind::texts,
      {Command::bench},
      {},
      {}};
  option.set = [](Draft& draft, const Value& value) {
    draft.config.sweep = std::get<std::vector<std::string>>(value);
    parse_sweeps(draft.config.sweep);
  };
  option.get = [](const Config& config, Value& value) {
    value = config.sweep;
    return !config.sweep.empty();
  };
  return option;
}

/// An option of a layer: there is one as soon as one of its options is given.
Option of_layer(Option option) {
  option.set = [set = std::move(option.set)](Draft& draft, const Value& value) {
    if (!draft.config.layer) { draft.config.layer.emplace(); }
    set(draft, value);
  };
  option.get = [get = std::move(option.get)](const Config& config, Value& value) { return config.layer && get(config, value); };
  return option;
}

/// A number, kept in the field of the layer that `field` names.
Option layer_real(std::string_view name, std::string help, double Layer::* field) {
  Option option{name, Scope::layer, std::move(help), ValueKind::real, kPlanning, {}, {}};
  option.set = [field](Draft& draft, const Value& value) { *draft.config.layer.*field = std::get<double>(value); };
  option.get = [field](const Config& config, Value& value) {
    value = *config.layer.*field;
    return true;
  };
  return of_layer(std::move(option));
}

Option layer_extent(std::string_view name, std::string help, std::int64_t Layer::* field) {
  return of_layer(
      integer(name, Scope::layer, std::move(help), kPlanning, 1, kMaxFeatures, [field](Config& c) -> auto& { return *c.layer.*field; }, 0));
}

template <class Enum>
Option layer_choice(std::string_view name, const std::string& help, Enum Layer::* field) {
  return of_layer(choice<Enum>(name, Scope::layer, help, kPlanning, [field](Config& c) -> auto& { return *c.layer.*field; }));
}

Option ranks_option() {
  Option option{
      "ranks", Scope::plan, "ranks to plan for, or several numbers of them, a job each: 1,2,4,...,4096", ValueKind::counts, {Command::plan},
      {},      {}};
  option.set = [](Draft& draft, const Value& value) {
    constexpr std::int64_t kMostRanks = std::int64_t{1} << 24;
    const auto& counts = std::get<std::vector<std::int64_t>>(value);
    ANNULUS_EXPECTS(!counts.empty(), "--ranks is empty");
    for (const std::int64_t count : counts) {
      ANNULUS_EXPECTS(count >= 1, "--ranks {} is below 1", count);
      ANNULUS_EXPECTS(count <= kMostRanks, "--ranks {} is above {}", count, kMostRanks);
    }
    draft.config.rank_counts = counts;
    draft.config.ranks = counts.front();
  };
  option.get = [](const Config& config, Value& value) {
    value = config.rank_counts;
    return !config.rank_counts.empty();
  };
  return option;
}

void add_layer_options(std::vector<Option>& all) {
  all.push_back(layer_extent("layer.embed", "features of /x and /y; by default heads x head-dim", &Layer::embed));
  all.push_back(layer_extent("layer.kdim", "features of /x_key, from which K is projected; by default those of /x", &Layer::kdim));
  all.push_back(layer_extent("layer.vdim", "features of /x_value, from which V is projected; by default those of /x", &Layer::vdim));
  all.push_back(of_layer(boolean("layer.bias", Scope::layer, "add biases after the products; by default the input's, if it has any",
                                 kPlanning, [](Config& c) -> auto& { return c.layer->bias; })));
  all.push_back(layer_choice("layer.qk-norm", "normalise q and k after their projection", &Layer::qk_norm));
  all.push_back(layer_choice("layer.output-norm", "normalise the attention's output before the output projection", &Layer::output_norm));
  all.push_back(layer_real("layer.norm-epsilon", "what norms add to variance or mean square", &Layer::norm_epsilon));
  all.push_back(layer_choice("layer.rotary",
                             "which elements of q and k the rotary embedding turns together, by the token's number; by default the input's "
                             "attribute `rope_pairs`, else none",
                             &Layer::rotary));
  all.push_back(
      layer_real("layer.rotary-base", "base of its angles; by default the input's attribute `rope_base`, else 10000", &Layer::rotary_base));
  all.push_back(layer_choice("layer.gate", "what multiplies the attention's output: a function of /wg x", &Layer::gate));
  all.push_back(layer_real("layer.gate-temperature", "divides what goes into it", &Layer::gate_temperature));
  all.push_back(
      of_layer(boolean("layer.bias-kv", Scope::layer,
                       "append the key /bias_k with the value /bias_v, which every query sees; by default the input's, if it has them",
                       kPlanning, [](Config& c) -> auto& { return c.layer->bias_kv; })));
  all.push_back(
      of_layer(integer("layer.zero-tokens", Scope::layer, "append so many keys of zeros with values of zeros, which every query sees",
                       kPlanning, 0, kMaxExtraKeys - 1, [](Config& c) -> auto& { return c.layer->zero_tokens; })));
}

std::vector<Option> make_options() {
  std::vector<Option> all;
  all.push_back(
      integer("batch", Scope::problem, "independent sequences", kShaping, 1, kMax, [](Config& c) -> auto& { return c.problem.batch; }));
  all.push_back(integer("seq-len", Scope::problem, "tokens of the sequence", kShaping, 1, kMax,
                        [](Config& c) -> auto& { return c.problem.seq_len; }));
  all.push_back(integer("heads", Scope::problem, "query heads", kShaping, 1, kMax, [](Config& c) -> auto& { return c.problem.heads; }));
  all.push_back(kv_heads_option());
  all.push_back(integer("head-dim", Scope::problem, "elements of a head, 1 to 256", kShaping, 1, kMaxHeadDim,
                        [](Config& c) -> auto& { return c.problem.head_dim; }));
  all.push_back(dtype_option());
  all.push_back(boolean("causal", Scope::problem, "a query sees no key after itself", kPlanning,
                        [](Config& c) -> auto& { return c.problem.causal; }));
  all.push_back(scale_option());
  all.push_back(kv_lengths_option());
  all.push_back(integer(
      "extra-keys", Scope::problem,
      "keys besides the sequence's that every query sees, causal or not, whatever its branches; by default the input's /k_extra, else none",
      kShaping, 0, kMaxExtraKeys, [](Config& c) -> auto& { return c.problem.extra_keys; }, 0));
  all.push_back(dropout_option());
  all.push_back(integer("dropout-seed", Scope::problem, "of the draws of --dropout", kPlanning, 0, kMax,
                        [](Config& c) -> auto& { return c.problem.dropout.seed; }));
  all.push_back(boolean("gradients", Scope::problem,
                        "also what a loss changes by with Q, K and V, from /do of the input, or a generated dO where it has none",
                        kPlanning, [](Config& c) -> auto& { return c.gradients; }));
  all.push_back(integer("seed", Scope::problem, "of generated input, sampled rows and random cases", kShaping, 0, kMax,
                        [](Config& c) -> auto& { return c.seed; }));

  all.push_back(list("segment-lengths", "tokens of a segment, one number for each branch; by default one branch, the whole sequence",
                     &Draft::segment_lengths, &Branch::segment_length));
  all.push_back(list("dilation-rates", "every r-th row of a segment, one number for each branch; by default 1", &Draft::dilation_rates,
                     &Branch::dilation_rate));
  all.push_back(choice<OffsetRule>("offset", Scope::pattern, "first row of a segment that a branch takes", kPlanning,
                                   [](Config& c) -> auto& { return c.pattern.offset; }));
  all.push_back(choice<HeadSplit>("head-split", Scope::pattern, "which heads run a branch", kPlanning,
                                  [](Config& c) -> auto& { return c.pattern.head_split; }));
  all.push_back(choice<Mixing>("mixing", Scope::pattern, "how the branches of one head combine", kPlanning,
                               [](Config& c) -> auto& { return c.pattern.mixing; }));
  all.push_back(choice<Ragged>("ragged", Scope::pattern, "rows of a segment that a rate or the sequence cuts short", kPlanning,
                               [](Config& c) -> auto& { return c.pattern.ragged; }));
  all.push_back(
      choice<SequenceOrder>("order", Scope::pattern,
                            "permutes the sequence before segments are cut and the result back; all but linear are another operator, "
                            "in which other tokens share a segment",
                            kPlanning, [](Config& c) -> auto& { return c.pattern.order; }));
  all.push_back(boolean("scale-by-branches", Scope::pattern, "divide the output by the number of branches", kPlanning,
                        [](Config& c) -> auto& { return c.pattern.scale_by_branches; }));

  add_layer_options(all);

  all.push_back(grid_option());
  all.push_back(choice<PartitionKind>("partition", Scope::execution, "which tokens a rank owns", kPlanning,
                                      [](Config& c) -> auto& { return c.partition; }));
  all.push_back(
      choice<Schedule>("schedule", Scope::execution, "how KV blocks travel", kPlanning, [](Config& c) -> auto& { return c.schedule; }));
  all.push_back(choice<KeyOrder>("key-order", Scope::execution,
                                 "in which order a query meets its keys; cyclic gives the same bits on any ranks", kPlanning,
                                 [](Config& c) -> auto& { return c.key_order; }));
  all.push_back(choice<TileOrder>("tile-order", Scope::execution,
                                  "in which order tiles of queries and keys are visited; results change by rounding alone", kPlanning,
                                  [](Config& c) -> auto& { return c.tile_order; }));
  all.push_back(choice<TransportKind>("transport", Scope::execution, "what moves them; auto takes what fits the job", kComputing,
                                      [](Config& c) -> auto& { return c.transport; }));
  all.push_back(choice<BackendKind>("backend", Scope::execution, "what computes", kPlanning, [](Config& c) -> auto& { return c.backend; }));
  all.push_back(choice<KernelKind>("kernel", Scope::execution, "attention kernel of backend cuda; auto takes fused on Hopper", kPlanning,
                                   [](Config& c) -> auto& { return c.kernel; }));
  all.push_back(integer(
      "tile-rows", Scope::execution, "query rows of a tile; by default the kernel's choice", kComputing, 1, 1 << 20,
      [](Config& c) -> auto& { return c.tile_rows; }, 0));
  all.push_back(integer(
      "threads", Scope::execution, "threads of a rank; by default the CPUs it may use divided by the ranks that share them", kComputing, 1,
      4096, [](Config& c) -> auto& { return c.threads; }, 0));
  all.push_back(integer("virtual-ranks", Scope::execution, "ranks of a ring inside one process", kComputing, 1, 4096,
                        [](Config& c) -> auto& { return c.virtual_ranks; }));
  all.push_back(integer("plan-cache", Scope::execution, "plans of virtual ranks and rows that are kept; 0 makes each anew",
                        {Command::bench}, 0, 1 << 20, [](Config& c) -> auto& { return c.plan_cache; }));
  all.push_back(boolean("share-gpu", Scope::execution, "let several ranks use one GPU (timings then mean nothing)", kComputing,
                        [](Config& c) -> auto& { return c.share_gpu; }));
  all.push_back(choice<MemoryPooling>("memory-pool", Scope::execution, "off: backend cuda takes each tensor from the driver, for debugging",
                                      kComputing, [](Config& c) -> auto& { return c.memory_pool; }));
  all.push_back(seconds("timeout", Scope::execution,
                        "seconds without progress, while waiting for a peer, after which the job is aborted; 0: never", kComputing,
                        &Config::timeout_s));
  all.push_back(
      seconds("max-time", Scope::job,
              "seconds from its start after which the job begins nothing more (no repetition, row, case or part), keeps what it has and "
              "ends with exit code 4; 0: no limit",
              kComputing, &Config::max_time_s));
  all.push_back(integer(
      "part-batch", Scope::job,
      "batch entries that are computed at a time, each part in the output before the next begins; by default all, or as many as fit",
      {Command::run}, 1, kMax, [](Config& c) -> auto& { return c.part_batch; }, 0));
  all.push_back(
      boolean("resume", Scope::job,
              "go on with the parts of a batch, or the rows of a table, that an earlier job has left in --output, if it left any: "
              "its settings must be the same",
              {Command::run, Command::bench}, [](Config& c) -> auto& { return c.resume; }));

  all.push_back(path("input", Scope::files, "HDF5 file with /q, /k and /v, or with /x and weights for a layer; by default generated",
                     {Command::run, Command::check, Command::bench, Command::plan}, [](Config& c) -> auto& { return c.input; }));
  all.push_back(path("output", Scope::files, "HDF5 file to write", {Command::run, Command::bench, Command::generate},
                     [](Config& c) -> auto& { return c.output; }));
  all.push_back(path("result", Scope::files, "what this result, or what is left of one, says of itself, instead of the machine",
                     {Command::info}, [](Config& c) -> auto& { return c.result; }));
  all.push_back(path("csv", Scope::files, "CSV file to write", {Command::bench, Command::plan}, [](Config& c) -> auto& { return c.csv; }));
  all.push_back(path("machine", Scope::files, "TOML file of a machine's constants, from which times are predicted",
                     {Command::bench, Command::plan}, [](Config& c) -> auto& { return c.machine; }));
  all.push_back(path("calibrate", Scope::files, "measure this machine's constants instead of rows, and write them to this TOML file",
                     {Command::bench}, [](Config& c) -> auto& { return c.calibrate; }));
  all.push_back(boolean("force", Scope::files, "replace an existing output",
                        {Command::run, Command::bench, Command::plan, Command::generate}, [](Config& c) -> auto& { return c.force; }));

  all.push_back(integer(
      "rows", Scope::check, "rows compared with the fp64 oracle; by default all of a small problem, else 256",
      {Command::check, Command::bench}, 1, kMax, [](Config& c) -> auto& { return c.rows; }, 0));
  all.push_back(integer(
      "cases", Scope::check, "random problems instead of the configured one", {Command::check}, 1, kMax,
      [](Config& c) -> auto& { return c.cases; }, 0));
  all.push_back(boolean("check", Scope::check,
                        "look whether the machine is fit: MPI, cores, GPUs and what reaches what, and messages over every transport",
                        {Command::info}, [](Config& c) -> auto& { return c.check; }));
  all.push_back(integer("warmup", Scope::bench, "runs before the timed ones", {Command::bench}, 0, 1 << 30,
                        [](Config& c) -> auto& { return c.warmup; }));
  all.push_back(
      integer("repetitions", Scope::bench, "timed runs", {Command::bench}, 1, 1 << 30, [](Config& c) -> auto& { return c.repetitions; }));
  all.push_back(sweep_option());
  all.push_back(ranks_option());
  return all;
}

std::int64_t parse_integer(std::string_view name, std::string_view text) {
  const std::string_view digits = text.starts_with('-') ? text.substr(1) : text;
  const bool decimal =
      !digits.empty() && digits.find_first_not_of("0123456789") == std::string_view::npos && (digits.size() == 1 || digits.front() != '0');
  ANNULUS_EXPECTS(decimal, "--{} '{}' is not a decimal integer", name, text);
  std::int64_t number = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), number);
  ANNULUS_EXPECTS(status == std::errc() && end == text.data() + text.size(), "--{} {} is out of range", name, text);
  return number;
}

double parse_real(std::string_view name, std::string_view text) {
  double number = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), number);
  ANNULUS_EXPECTS(status == std::errc() && end == text.data() + text.size() && std::isfinite(number), "--{} '{}' is not a finite number",
                  name, text);
  return number;
}

std::vector<std::int64_t> parse_integers(std::string_view name, std::string_view text) {
  std::vector<std::int64_t> numbers;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    ANNULUS_EXPECTS(comma > begin, "--{} '{}' has a hole", name, text);
    numbers.push_back(parse_integer(name, text.substr(begin, comma - begin)));
    begin = comma + 1;
  }
  return numbers;
}

/// "1,2,4,...,64": what stands for dots goes on as the two numbers before them do, by their ratio where that is a whole number, else by
/// their difference.
std::vector<std::int64_t> parse_counts(std::string_view name, std::string_view text) {
  constexpr std::string_view kDots = ",...,";
  const std::size_t dots = text.find(kDots);
  if (dots == std::string_view::npos) { return parse_integers(name, text); }
  std::vector<std::int64_t> numbers = parse_integers(name, text.substr(0, dots));
  const std::vector<std::int64_t> rest = parse_integers(name, text.substr(dots + kDots.size()));
  ANNULUS_EXPECTS(numbers.size() >= 2, "--{} '{}' has fewer than two numbers before the dots, which do not say how they go on", name, text);
  const std::int64_t before = numbers[numbers.size() - 2];
  ANNULUS_EXPECTS(before >= 1 && before < numbers.back() && numbers.back() < rest.front(), "--{} '{}' does not ascend to {}", name, text,
                  rest.front());
  const bool by_ratio = numbers.back() % before == 0;
  constexpr std::size_t kMostNumbers = 1000;
  const std::int64_t ratio = numbers.back() / before;
  const std::int64_t difference = numbers.back() - before;
  while (numbers.back() < rest.front()) {
    const std::int64_t last = numbers.back();
    const bool beyond = by_ratio ? last > rest.front() / ratio : last > rest.front() - difference;
    ANNULUS_EXPECTS(!beyond && numbers.size() < kMostNumbers, "--{} '{}' does not come to {}{}", name, text, rest.front(),
                    beyond ? "" : fmt::format(" in {} numbers", kMostNumbers));
    numbers.push_back(by_ratio ? last * ratio : last + difference);
  }
  numbers.insert(numbers.end(), rest.begin() + 1, rest.end());
  return numbers;
}

}  // namespace

std::string_view program_help() { return "Ring dilated attention over sequences too long for one GPU."; }

std::string_view help_of(Command command) {
  switch (command) {
    case Command::run:
      return "compute one attention from a file or generated input; write outputs, timings and provenance";
    case Command::check:
      return "run and compare with an independent fp64 oracle";
    case Command::bench:
      return "check, then time: warm-up and repetitions; one configuration or a sweep";
    case Command::plan:
      return "print memory, traffic, FLOPs and, of a known machine, times for any number of ranks, without running";
    case Command::info:
      return "versions, backends, transports, kernels, GPUs and their links, and which rank runs where";
    case Command::generate:
      break;
  }
  return "write a random Q, K, V file, the same for any number of ranks";
}

std::string_view exit_codes_help() {
  return "Exit codes: 0 passed; 1 a check failed, or a result is not finite; 2 bad usage, configuration or input; 3 a failure at run "
         "time;\n"
         "4 stopped by SIGUSR1, SIGTERM or --max-time with work left.";
}

std::string_view value_name_of(const Option& option) {
  switch (option.kind) {
    case ValueKind::boolean:
      return "[true|false]";
    case ValueKind::integers:
    case ValueKind::counts:
      return "N,N,...";
    case ValueKind::integer:
      return "N";
    case ValueKind::real:
      return "X";
    case ValueKind::texts:
      return "KEY=VALUES";
    case ValueKind::text:
      break;
  }
  return "NAME";
}

bool Option::is_of(Command command) const { return std::find(commands.begin(), commands.end(), command) != commands.end(); }

const std::vector<Option>& options() {
  static const std::vector<Option> all = make_options();
  return all;
}

const Option* find_option(std::string_view name) {
  for (const Option& option : options()) {
    if (option.name == name) { return &option; }
  }
  return nullptr;
}

Value parse_value(const Option& option, std::string_view text) {
  switch (option.kind) {
    case ValueKind::integer:
      return parse_integer(option.name, text);
    case ValueKind::real:
      return parse_real(option.name, text);
    case ValueKind::boolean:
      ANNULUS_EXPECTS(text == "true" || text == "false", "--{} '{}' is neither true nor false", option.name, text);
      return text == "true";
    case ValueKind::integers:
      return parse_integers(option.name, text);
    case ValueKind::counts:
      return parse_counts(option.name, text);
    case ValueKind::texts: {
      std::vector<std::string> lines;
      for (std::size_t begin = 0; begin <= text.size();) {
        const std::size_t end = std::min(text.find('\n', begin), text.size());
        lines.emplace_back(text.substr(begin, end - begin));
        begin = end + 1;
      }
      return lines;
    }
    case ValueKind::text:
      break;
  }
  return std::string(text);
}

std::string text_of(const Value& value) {
  if (const auto* number = std::get_if<std::int64_t>(&value)) { return fmt::format("{}", *number); }
  if (const auto* real = std::get_if<double>(&value)) { return fmt::format("{}", *real); }
  if (const auto* flag = std::get_if<bool>(&value)) { return *flag ? "true" : "false"; }
  if (const auto* numbers = std::get_if<std::vector<std::int64_t>>(&value)) { return fmt::format("{}", fmt::join(*numbers, ",")); }
  if (const auto* lines = std::get_if<std::vector<std::string>>(&value)) { return fmt::format("{}", fmt::join(*lines, "\n")); }
  return std::get<std::string>(value);
}

void apply(Draft& draft, const Option& option, const Value& value) {
  option.set(draft, value);
  draft.config.given.emplace(option.name);
}

Config complete(Draft draft) {
  Config& config = draft.config;
  ANNULUS_EXPECTS(draft.dilation_rates.empty() || !draft.segment_lengths.empty(), "--dilation-rates needs --segment-lengths");
  if (draft.dilation_rates.empty()) { draft.dilation_rates.assign(draft.segment_lengths.size(), 1); }
  ANNULUS_EXPECTS(draft.dilation_rates.size() == draft.segment_lengths.size(),
                  "--segment-lengths has {} numbers and --dilation-rates {}; one for each branch", draft.segment_lengths.size(),
                  draft.dilation_rates.size());
  config.pattern.branches.clear();
  for (std::size_t i = 0; i < draft.segment_lengths.size(); ++i) {
    config.pattern.branches.push_back({draft.segment_lengths[i], draft.dilation_rates[i]});
  }
  ANNULUS_EXPECTS(!config.resume || !config.output.empty(), "--resume goes on with what is in --output, which is not given");
  ANNULUS_EXPECTS(!config.resume || !config.force, "--resume goes on with --output, and --force begins it anew");
  if (!config.given.contains("kv-heads")) { config.problem.kv_heads = config.problem.heads; }
  if (!config.pattern.branches.empty()) { validate(config.pattern); }
  if (config.input.empty()) { validate(config.problem); }
  return std::move(config);
}

}  // namespace annulus::app
