// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/session.hpp>

#include <annulus/attention/attention_kernel.hpp>
#include <annulus/core/affinity.hpp>
#include <annulus/core/error.hpp>
#include <annulus/core/thread_stacks.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/gpu/gpu_assignment.hpp>
#include <annulus/plan/choice.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/plan/key_order.hpp>

#include "attention/host_load.hpp"
#include "cell_source.hpp"
#include "device/host_memory.hpp"
#include "permuted_rows.hpp"
#include "same_problem.hpp"

#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <mutex>
#include <optional>

namespace annulus {

namespace {

/// Fills in what does not need the input: dense pattern, scale.
void fill_defaults(Config& config) {
  if (config.pattern.branches.empty()) { config.pattern.branches = dense_pattern(config.problem.seq_len).branches; }
  if (config.scale) { config.problem.scale = *config.scale; }
  if (config.dtype) { config.problem.dtype = *config.dtype; }
  validate(config.problem);
  validate(config.pattern);
  validate(config.problem, config.pattern);
}

void take_extent(const Config& config, const char* option, std::int64_t& extent, std::int64_t found) {
  ANNULUS_EXPECTS(!config.given.contains(option) || extent == found, "--{} {} contradicts the input file {}, which has {}", option, extent,
                  config.input, found);
  extent = found;
}

void take_kv_lengths(Config& config, const Problem& found) {
  if (found.kv_lengths.empty()) { return; }
  ANNULUS_EXPECTS(!config.given.contains("kv-lengths") || config.problem.kv_lengths == found.kv_lengths,
                  "--kv-lengths {} contradicts /kv_lengths of the input file {}, which is {}", fmt::join(config.problem.kv_lengths, ","),
                  config.input, fmt::join(found.kv_lengths, ","));
  config.problem.kv_lengths = found.kv_lengths;
}

void take_problem(Config& config, const Problem& found) {
  take_extent(config, "batch", config.problem.batch, found.batch);
  take_extent(config, "seq-len", config.problem.seq_len, found.seq_len);
  take_extent(config, "heads", config.problem.heads, found.heads);
  take_extent(config, "kv-heads", config.problem.kv_heads, found.kv_heads);
  take_extent(config, "head-dim", config.problem.head_dim, found.head_dim);
  take_kv_lengths(config, found);
  config.problem.dtype = found.dtype;
  config.problem.scale = found.scale;
}

/// The scale of what is generated.
void fill_in_scale(Config& config) {
  if (!config.scale) { config.problem.scale = 1.0 / std::sqrt(static_cast<double>(config.problem.head_dim)); }
}

int generator_threads(const Config& config) { return checked_narrow<int>(std::max<std::int64_t>(1, config.threads)); }

/// Problem and source of a configuration without a layer.
std::shared_ptr<const TensorSource> open_source(Config& config) {
  if (config.input.empty()) {
    fill_in_scale(config);
    fill_defaults(config);
    return make_generator(config.problem, config.seed, generator_threads(config));
  }
  std::unique_ptr<TensorSource> source = open_input(config.input, config.gradients ? InputUse::gradients : InputUse::forward);
  take_problem(config, source->problem());
  take_extent(config, "extra-keys", config.problem.extra_keys, source->problem().extra_keys);
  fill_defaults(config);
  if (config.gradients) { source = with_generated_dout(std::move(source), config.seed, generator_threads(config)); }
  return source;
}

/// What the input file says of the layer, but where the configuration says otherwise. @throws InvalidArgument where it must not
void take_layer(Config& config, const Layer& found) {
  Layer& layer = *config.layer;
  take_extent(config, "layer.embed", layer.embed, found.embed);
  take_extent(config, "layer.kdim", layer.kdim, found.kdim);
  take_extent(config, "layer.vdim", layer.vdim, found.vdim);
  ANNULUS_EXPECTS(!config.given.contains("layer.bias") || layer.bias == found.bias,
                  "--layer.bias {} contradicts the input file {}, which has {}", layer.bias, config.input,
                  found.bias ? "some of /bq, /bk, /bv and /bo" : "none of /bq, /bk, /bv and /bo");
  layer.bias = found.bias;
  ANNULUS_EXPECTS(!config.given.contains("layer.bias-kv") || layer.bias_kv == found.bias_kv,
                  "--layer.bias-kv {} contradicts the input file {}, which has {}", layer.bias_kv, config.input,
                  found.bias_kv ? "/bias_k and /bias_v" : "neither /bias_k nor /bias_v");
  layer.bias_kv = found.bias_kv;
  if (!config.given.contains("layer.rotary")) { layer.rotary = found.rotary; }
  if (!config.given.contains("layer.rotary-base")) { layer.rotary_base = found.rotary_base; }
}

/// Problem, layer and source of a configuration with a layer.
std::shared_ptr<const LayerSource> open_layer_source(Config& config) {
  std::shared_ptr<const LayerSource> source;
  if (config.input.empty()) {
    fill_in_scale(config);
    complete_extents(*config.layer, config.problem);
  } else {
    source = open_layer_input(config.input, config.given.contains("heads") ? std::optional(config.problem.heads) : std::nullopt);
    take_problem(config, source->problem());
    take_layer(config, source->layer());
  }
  const std::int64_t appended = extra_keys_of(*config.layer);
  ANNULUS_EXPECTS(!config.given.contains("extra-keys") || config.problem.extra_keys == appended,
                  "--extra-keys {}: of a layer they are what it appends (--layer.bias-kv, --layer.zero-tokens), which is {}",
                  config.problem.extra_keys, appended);
  config.problem.extra_keys = appended;
  fill_defaults(config);
  validate(*config.layer, config.problem, config.pattern);
  if (!source) { source = make_layer_generator(config.problem, *config.layer, config.seed, generator_threads(config)); }
  require_weights(*source, *config.layer);
  return source;
}

/// What has no backward pass yet is refused, with what has one.
void require_gradients(const Config& config) {
  if (!config.gradients) { return; }
  ANNULUS_EXPECTS(!config.layer, "--gradients: a layer has no backward pass; attention alone, of /q, /k and /v, has one");
}

/// Opens what `resolved.config` computes with, and fills in what that says.
void open_input_of(ResolvedConfig& resolved) {
  require_gradients(resolved.config);
  if (resolved.config.layer) {
    resolved.layer = open_layer_source(resolved.config);
  } else {
    resolved.source = open_source(resolved.config);
  }
  // An input may bring them.
  ANNULUS_EXPECTS(!resolved.config.gradients || resolved.config.problem.extra_keys == 0,
                  "--gradients: extra keys have no backward pass; --extra-keys 0, or an input without /k_extra, has one");
}

/// Nothing else tells [batch, heads, seq, head_dim] from the layout that is read. Once in a process, for its first configuration.
void warn_of_layout(const Config& config) {
  static std::once_flag warned;
  if (config.input.empty() || config.layer || config.problem.seq_len >= config.problem.heads) { return; }
  std::call_once(warned, [&] {
    spdlog::warn("input file '{}' has {} rows and {} heads: is it [batch, seq, heads, head_dim]?", config.input, config.problem.seq_len,
                 config.problem.heads);
  });
}

}  // namespace

const InputSource& ResolvedConfig::input() const {
  if (layer) { return *layer; }
  return *source;
}

DType ResolvedConfig::input_dtype() const { return layer ? layer->problem().dtype : source->problem().dtype; }

LayerCost layer_cost_of(const Config& config, const LayerSource& source, const Problem& problem, std::int64_t rows) {
  return layer_cost(source, *config.layer, problem, rows, config.backend != BackendKind::cuda);
}

std::vector<NamedFile> named_files(const Config& config, const InputSource* input) {
  std::vector<NamedFile> files{{"standard output", "/dev/stdout", FileUse::printed}, {"standard error", "/dev/stderr", FileUse::printed}};
  const auto add = [&](const char* role, const std::string& path, FileUse use) {
    if (!path.empty()) { files.push_back({role, path, use}); }
  };
  add("the preset", config.preset_file, FileUse::read);
  add("--config", config.config_file, FileUse::read);
  add("--machine", config.machine, FileUse::read);
  add("--input", config.input, FileUse::read);
  if (input != nullptr) {
    const std::vector<std::string> paths = input->files();
    for (std::size_t index = 1; index < paths.size(); ++index) { add("a part of --input,", paths[index], FileUse::read); }
  }
  add("--output", config.output, FileUse::written);
  add("--csv", config.csv, FileUse::written);
  add("--calibrate", config.calibrate, FileUse::written);
  return files;
}

namespace {

/// Fills in the kernel of backend cuda. `hopper`: of every process's GPUs.
void choose_kernel(Config& config, bool hopper) {
  if (config.backend == BackendKind::cuda) {
    config.kernel = resolve_kernel(config.kernel, config.problem, config.tile_rows, hopper, config.gradients);
    return;
  }
  ANNULUS_EXPECTS(config.kernel == KernelKind::automatic, "--kernel {} is one of backend cuda, and this is backend {}",
                  to_string(config.kernel), to_string(config.backend));
}

/// Fills in grid, partition and schedule.
void fill_in_ways(Config& config, std::int64_t ranks) {
  Grid asked = config.grid;
  if (config.layer && asked.automatic) { asked = Grid(); }
  ANNULUS_EXPECTS(!config.layer || asked.heads == 1, "--grid {} spreads heads, and a layer's products take all heads of a row",
                  to_string(asked));
  GridChoice choice = choose_grid(asked, config.problem, config.pattern, config.partition, config.schedule, ranks);
  config.places = choice.grid;
  config.grid_reason = std::move(choice.reason);
  // Of a KV head that several rings have, each would have a part of dK and dV.
  if (config.gradients && config.places.heads > config.problem.kv_heads) {
    ANNULUS_EXPECTS(config.grid.automatic, "--gradients: --grid {} gives a KV head to several rings; heads may be at most the {} KV heads",
                    to_string(config.grid), config.problem.kv_heads);
    choice = choose_grid(Grid(), config.problem, config.pattern, config.partition, config.schedule, ranks);
    config.places = choice.grid;
    config.grid_reason = "gradients keep a KV head in one ring";
  }
  Ways ways =
      choose_ways(cell_of(config.problem, config.places, 0).problem, config.pattern, config.partition, config.schedule, config.places.seq);
  ANNULUS_EXPECTS(!config.layer || ways.partition != PartitionKind::striped,
                  "--partition striped: a layer projects rows that are neighbours; contiguous and zigzag have them");
  config.partition = ways.partition;
  config.schedule = ways.schedule;
  config.ways_reason = std::move(ways.reason);
}

}  // namespace

ResolvedConfig resolve_without_job(Config asked) {
  ResolvedConfig resolved;
  resolved.config = std::move(asked);
  Config& config = resolved.config;
  open_input_of(resolved);
  resolved.ranks = config.ranks > 0 ? config.ranks : config.virtual_ranks;
  fill_in_ways(config, resolved.ranks);
  // A login node plans for GPUs that it does not have: what is asked for is taken to be there.
  choose_kernel(config, sees_only_hopper() || (config.kernel == KernelKind::fused && visible_gpus().empty()));
  routing_of(config);
  warn_of_layout(config);
  return resolved;
}

Routing routing_of(const Config& config) {
  const std::string kernel = config.backend == BackendKind::cuda ? fmt::format("kernel {}", to_string(config.kernel))
                             : config.tile_rows > 0
                                 ? fmt::format("backend {} with --tile-rows {}", to_string(config.backend), config.tile_rows)
                                 : fmt::format("backend {}", to_string(config.backend));
  Routing routing = choose_routing(config.partition, config.schedule, config.problem.causal, config.key_order, config.tile_order,
                                   kernel_block_rows(config.backend, config.kernel, config.tile_rows), kernel);
  routing.gradients = config.gradients;
  return routing;
}

std::int64_t default_threads(const Communicator& comm) {
  CpuMask mine;
  together(comm, [&] { mine = allowed_cpus(); });
  const std::string bytes(reinterpret_cast<const char*>(mine.data()), mine.size() * sizeof(mine[0]));
  const std::string host = comm.host() + '\n';
  std::int64_t sharing = 0;
  for (const std::string& theirs : comm.all_gather(host + bytes)) {
    if (!theirs.starts_with(host)) { continue; }
    CpuMask mask((theirs.size() - host.size()) / sizeof(mine[0]));
    std::memcpy(mask.data(), theirs.data() + host.size(), mask.size() * sizeof(mask[0]));
    sharing += overlap(mine, mask) ? 1 : 0;
  }
  return std::max<std::int64_t>(1, count_of(mine) / std::max<std::int64_t>(1, sharing));
}

ResolvedConfig resolve(Config asked, const Communicator& comm) {
  ResolvedConfig resolved;
  resolved.config = std::move(asked);
  Config& config = resolved.config;
  // Collective, and ranks may differ in whether they were told a number.
  if (comm.max(static_cast<std::int64_t>(config.threads == 0 ? 1 : 0)) != 0) {
    const std::int64_t threads = default_threads(comm);
    if (config.threads == 0) { config.threads = threads; }
  }
  bool hopper = false;
  together(comm, [&] { hopper = config.backend == BackendKind::cuda && sees_only_hopper(); });
  hopper = comm.max(static_cast<std::int64_t>(hopper ? 0 : 1)) == 0;
  together(comm, [&] {
    require_thread_stacks(checked_narrow<int>(config.threads));
    open_input_of(resolved);
    choose_kernel(config, hopper);
    ANNULUS_EXPECTS(config.virtual_ranks == 1 || comm.size() == 1, "--virtual-ranks {} runs in one process, and this job has {}",
                    config.virtual_ranks, comm.size());
    const bool loopback = config.virtual_ranks > 1 || config.transport == TransportKind::loopback;
    ANNULUS_EXPECTS(!loopback || config.transport == TransportKind::loopback || config.transport == TransportKind::automatic,
                    "--virtual-ranks {} runs over transport loopback, not {}", config.virtual_ranks, to_string(config.transport));
    ANNULUS_EXPECTS(!loopback || comm.size() == 1, "transport loopback runs in one process, and this job has {}", comm.size());
    if (loopback) { config.transport = TransportKind::loopback; }
    resolved.ranks = loopback ? config.virtual_ranks : comm.size();
    fill_in_ways(config, resolved.ranks);
    routing_of(config);
    if (comm.rank() == 0) { require_distinct_files(named_files(config, &resolved.input())); }
  });
  if (comm.rank() == 0) { warn_of_layout(config); }
  require_same_problem(resolved, comm);
  return resolved;
}

namespace {

/// The same kind for all rings: a transport that one of them cannot have would make its figures those of another program. Collective.
TransportKind transport_of_rings(TransportKind asked, const Communicator& comm, const Communicator& ring, Device& device) {
  const bool chooses = asked == TransportKind::automatic && ring.size() > 1 && !device.host_memory();
  if (!chooses) { return asked; }
  TransportKind kind = TransportKind::automatic;
  together(comm, [&] { kind = choose_gpu_transport(ring, device); });
  const bool all_p2p = comm.min(static_cast<std::int64_t>(kind == TransportKind::p2p ? 1 : 0)) == 1;
  if (kind != TransportKind::p2p || all_p2p) { return kind; }
  return gpu_transport_without_p2p();
}

}  // namespace

GridCell part_of_batch(const Problem& whole, std::int64_t parts, std::int64_t index) {
  Grid grid;
  grid.batch = parts;
  return cell_of(whole, grid, index);
}

Session::Session(const ResolvedConfig& resolved, const Communicator& comm, const TransportDecorator& decorate, PlanCache* cache,
                 std::optional<GridCell> part)
    : resolved_(resolved),
      comm_(comm),
      part_(part ? std::move(*part) : part_of_batch(resolved.config.problem, 1, 0)),
      ring_comm_(resolved.config.places.rings() == 1 || comm.size() == 1 ? comm.share()
                                                                         : comm.split(comm.rank() / resolved.config.places.seq)),
      partition_(resolved.config.partition, resolved.config.problem.seq_len, resolved.config.places.seq) {
  const Config& config = resolved.config;
  const bool loopback = config.transport == TransportKind::loopback;
  std::vector<std::shared_ptr<const RingPlan>> plans;
  PlanCache own_cache(0);
  together(comm, [&] {
    for (std::int64_t rank = loopback ? 0 : comm.rank(); rank < (loopback ? resolved.ranks : comm.rank() + 1); ++rank) {
      const std::int64_t ring = ring_of(rank);
      if (rings_.empty() || rings_.back().number != ring) { rings_.push_back({ring, cell(ring), {}, {}}); }
      plans.push_back((cache != nullptr ? *cache : own_cache)
                          .plan(rings_.back().cell.problem, config.pattern, partition_, routing_of(config), rank % grid().seq));
    }
  });
  DeviceOptions options;
  options.kind = config.backend;
  options.threads = checked_narrow<int>(config.threads);
  options.memory_pool = config.memory_pool;
  std::int64_t sharing = comm.host_size();
  if (config.backend == BackendKind::cuda) {
    options.number = assign_gpu(comm, config.share_gpu);
    sharing = ranks_on_gpu(comm, options.number);
  }
  together(comm, [&] {
    device_ = make_device(options);
    kernel_ = make_attention_kernel({config.kernel, options.threads, config.tile_rows, &comm.watchdog().progress_counter()}, *device_);
    ANNULUS_EXPECTS(!config.gradients || kernel_->has_gradients(), "--gradients: {} has no backward pass", kernel_->describe());
    queue_ = device_->make_queue();
  });
  // Transports come before the look at the free memory: they take some of it.
  if (loopback) {
    for (std::int64_t ring = 0; ring < grid().rings(); ++ring) {
      std::ranges::move(make_loopback_transports(grid().seq, *device_), std::back_inserter(transports_));
    }
  } else {
    const TransportKind kind = transport_of_rings(config.transport, comm, ring_comm_, *device_);
    together(comm, [&] { transports_.push_back(make_transport(kind, ring_comm_, *device_, config.share_gpu)); });
  }
  double times = 0;
  const auto require_memory = [&] {
    predicted_bytes_ = kernel_->workspace_bytes(config.problem.head_dim, config.problem.dtype);
    if (config.gradients) {
      predicted_bytes_ = std::max(predicted_bytes_, kernel_->gradient_workspace_bytes(config.problem.head_dim, config.problem.dtype));
    }
    for (const auto& plan : plans) { predicted_bytes_ += plan_memory(plan->problem, sizes_of(*plan), kernel_->plan_bytes(*plan)).total(); }
    std::int64_t reading = 0;
    if (resolved.layer) {
      predicted_bytes_ += layer_bytes(plans);
      reading += weight_reading_bytes(*resolved.layer, config.problem.dtype);
    } else {
      std::vector<Tensor> read(tensors_of(config.problem).begin(), tensors_of(config.problem).end());
      if (config.gradients) { read.push_back(Tensor::dout); }
      for (const Tensor tensor : read) {
        if (const auto bands = resolved.source->bands(tensor)) { reading += bands->bytes() + bands->decoding_bytes(); }
        if (comm.host_size() > 1 && !moves_rows()) { reading += host_load_bytes(*resolved.source, tensor); }
      }
      if (moves_rows()) { reading += permuted_bytes(rings_.front().cell.problem, ring_comm_, plans); }
      reading += CellSource::bytes(config.problem, rings_.front().cell);
    }
    if (device_->host_memory()) {
      predicted_bytes_ += reading;
    } else {
      const std::int64_t free = available_host_memory() / comm.host_size();
      times = static_cast<double>(reading) / static_cast<double>(std::max<std::int64_t>(1, free));
      ANNULUS_EXPECTS(reading <= free,
                      "rank {} on {} needs {} bytes of host memory to read {} in chunks and to move its rows, and {} are free", comm.rank(),
                      comm.host(), reading, resolved.input().describe(), free);
    }
    const std::int64_t available = device_->available_bytes() / sharing;
    times = std::max(times, static_cast<double>(predicted_bytes_) / static_cast<double>(std::max<std::int64_t>(1, available)));
    ANNULUS_EXPECTS(predicted_bytes_ <= available, "rank {} on {} needs {} bytes by plan and {} are free ({} of them for each of {} ranks)",
                    comm.rank(), comm.host(), predicted_bytes_, available * sharing, available, sharing);
  };
  try {
    together(comm, require_memory);
  } catch (const InvalidArgument& error) {
    if (times > 1) { throw MemoryShortage({error.code(), error.what(), true}, times); }
    throw;
  } catch (const AgreedError& error) {
    const double most = comm.max(times);
    if (most > 1) { throw MemoryShortage(error, most); }
    throw;
  }
  if (decorate) {
    for (auto& transport : transports_) { transport = decorate(std::move(transport)); }
  }
  together(comm, [&] {
    for (std::size_t index = 0; index < plans.size(); ++index) {
      executors_.push_back(
          std::make_unique<RingExecutor>(std::move(plans[index]), *kernel_, *device_, *transports_[index], *queue_, comm.watchdog()));
    }
    const std::size_t each = executors_.size() / rings_.size();
    for (std::size_t index = 0; index < rings_.size(); ++index) {
      rings_[index].executors = std::span(executors_).subspan(index * each, each);
    }
    if (resolved.layer) { make_layers(); }
  });
  // Connecting sends, too: a rank on which it fails must end the job before it unwinds.
  fail_fast(comm, [&] {
    for (const auto& executor : executors_) { executor->connect(); }
  });
}

Session::~Session() {
  // Executors own memory that transports may still touch: the transports let go first, unless the job is failing and peers may be gone.
  if (!unwinding_.now() && executors_.size() == transports_.size() && queue_) {
    try {
      queue_->synchronize();
      for (const auto& transport : transports_) { transport->prepare({}); }
    } catch (const std::exception& error) { comm_.abort(error.what()); }
  }
  transports_.clear();
}

const LocalRing* Session::local_ring(std::int64_t number) const {
  const auto found = std::find_if(rings_.begin(), rings_.end(), [&](const LocalRing& ring) { return ring.number == number; });
  return found == rings_.end() ? nullptr : &*found;
}

GridCell Session::cell(std::int64_t ring) const {
  GridCell cell = cell_of(part_.problem, grid(), ring);
  cell.first_batch += part_.first_batch;
  // Draws are of the whole batch's entries.
  if (cell.problem.dropout.probability > 0) { cell.problem.dropout.first_batch = cell.first_batch; }
  return cell;
}

bool Session::move_to(const GridCell& part) {
  if (!(part.problem == part_.problem)) { return false; }
  // What is dropped depends on the entries' numbers, which executors have been told.
  if (part.problem.dropout.probability > 0 && part.first_batch != part_.first_batch) { return false; }
  part_ = part;
  for (LocalRing& ring : rings_) { ring.cell = cell(ring.number); }
  return true;
}

const Problem& Session::problem() const { return resolved_.config.problem; }
const Pattern& Session::pattern() const { return resolved_.config.pattern; }
std::vector<Tensor> Session::tensors() const {
  std::vector<Tensor> all(kSequenceTensors.begin(), kSequenceTensors.end());
  if (resolved_.config.gradients) { all.push_back(Tensor::dout); }
  return all;
}
bool Session::is_permuted() const { return pattern().order != SequenceOrder::linear; }

bool Session::moves_rows() const { return is_permuted() || !partition_.keeps_neighbours(); }

std::int64_t Session::layer_bytes(std::span<const std::shared_ptr<const RingPlan>> plans) const {
  const Config& config = resolved_.config;
  std::int64_t bytes = layer_kernel_bytes(config.backend, checked_narrow<int>(config.threads));
  LayerCost largest;
  for (const auto& plan : plans) {
    const LayerCost cost = layer_cost_of(config, *resolved_.layer, plan->problem, plan->local_rows);
    bytes += cost.activation_bytes;
    if (cost.scratch_bytes >= largest.scratch_bytes) { largest = cost; }
  }
  return bytes + largest.weight_bytes + largest.scratch_bytes;
}

void Session::make_layers() {
  std::int64_t rows = 0;
  for (const auto& executor : executors_) { rows = std::max(rows, executor->plan().local_rows); }
  layer_resources_ = std::make_unique<LayerResources>(*resolved_.layer, *resolved_.config.layer, problem(), rows,
                                                      checked_narrow<int>(resolved_.config.threads), *device_, *queue_);
  for (const LocalRing& ring : rings_) {
    for (const auto& executor : ring.executors) {
      layers_.push_back(std::make_unique<LayerExecutor>(*layer_resources_, *executor, *device_, *queue_, comm_.watchdog()));
    }
  }
  const std::size_t each = layers_.size() / rings_.size();
  for (std::size_t index = 0; index < rings_.size(); ++index) { rings_[index].layers = std::span(layers_).subspan(index * each, each); }
}

void Session::load_layer() {
  together(comm_, [&] {
    layer_resources_->load();
    for (const LocalRing& ring : rings_) {
      for (const auto& layer : ring.layers) {
        layer->load(ring.cell.first_batch);
        layer->project();  // warm_up() attends
      }
    }
  });
}

void Session::load() {
  if (resolved_.layer) {
    load_layer();
  } else if (moves_rows()) {
    // What the ranks of one ring have agreed on, the others must hear of.
    together(comm_, [&] {
      for (const LocalRing& ring : rings_) { load_permuted(*this, ring); }
    });
  } else {
    load_ranges();
  }
  together(comm_, [&] {
    if (!resolved_.layer) { load_extra_keys(); }
    for (const auto& executor : executors_) { executor->warm_up(); }
  });
}

void Session::load_extra_keys() {
  if (problem().extra_keys == 0) { return; }
  for (const LocalRing& ring : rings_) {
    const CellSource of_cell(*resolved_.source, ring.cell);
    for (const auto& executor : ring.executors) { executor->load_extra_keys(of_cell); }
  }
  resolved_.source->release_buffers();
}

void Session::load_ranges() {
  together(comm_, [&] {
    const TensorSource& source = *resolved_.source;
    std::vector<HostBox> boxes;
    for (const std::int64_t rank : comm_.host_ranks()) {
      const GridCell cell = this->cell(ring_of(rank));
      boxes.push_back({cell.first_batch, cell.problem.batch, partition_.shard(rank % grid().seq)});
    }
    std::exception_ptr failure;
    for (const Tensor tensor : tensors()) {
      // Where rows lie in chunks that are decoded whole, the ranks of a host decode each of them once for all.
      const bool shared = comm_.host_size() > 1 && source.bands(tensor).has_value();
      try {
        if (shared) {
          const GridCell& cell = rings_.front().cell;
          load_on_host(source, tensor, comm_, boxes,
                       [&](const TensorSource& rows, Tensor which, std::int64_t batch, std::int64_t first, std::int64_t count) {
                         const CellSource of_cell(rows, cell);
                         executors_.front()->load_rows(of_cell, which, batch - cell.first_batch, first, count);
                       });
        } else if (!failure) {
          for (const LocalRing& ring : rings_) {
            const CellSource of_cell(source, ring.cell);
            for (const auto& executor : ring.executors) { executor->load(of_cell, tensor); }
          }
        }
      } catch (...) {
        if (!failure) { failure = std::current_exception(); }  // the host's other ranks are still to be served
      }
    }
    source.release_buffers();
    if (failure) { std::rethrow_exception(failure); }
  });
}

void Session::run(Passing passing) {
  fail_fast(comm_, [&] {
    for (const auto& layer : layers_) { layer->project(); }
    run_lockstep(executors_, passing == Passing::on);
    for (const auto& layer : layers_) { layer->finish(); }
    for (const auto& executor : executors_) {
      executor->drain();
      if (passing == Passing::on) { executor->check_traffic(); }
    }
  });
}

double Session::slowest_ms() {
  double slowest = 0;
  if (!layers_.empty()) {
    slowest = layers_.back()->ms_since_begin_of(*layers_.front());
  } else if (executors_.size() > 1) {
    // Virtual ranks share one queue: the run lasts from the first one's begin to the last one's end.
    slowest = executors_.back()->ms_since_begin_of(*executors_.front());
  } else {
    slowest = executors_.front()->total_ms();
  }
  return comm_.max(slowest);
}

double Session::backward_ms() {
  double slowest = 0;
  for (const auto& executor : executors_) { slowest = std::max(slowest, executor->backward_ms()); }
  return comm_.max(slowest);
}

Session::LayerMs Session::layer_ms() {
  LayerMs sums;
  for (const auto& layer : layers_) {
    sums.project += layer->project_ms();
    sums.finish += layer->finish_ms();
  }
  return {comm_.max(sums.project), comm_.max(sums.finish)};
}

std::vector<std::vector<StepTiming>> Session::local_timings() {
  std::vector<std::vector<StepTiming>> local;
  for (const auto& executor : executors_) { local.push_back(executor->timings()); }
  return local;
}

std::vector<std::vector<StepTiming>> gather_timings(const Communicator& comm, const std::vector<std::vector<StepTiming>>& local) {
  if (comm.size() == 1) { return local; }
  const std::vector<StepTiming>& own = local.front();  // several ranks in one process are all there are
  const std::string bytes(reinterpret_cast<const char*>(own.data()), own.size() * sizeof(StepTiming));
  std::vector<std::vector<StepTiming>> gathered;
  for (const std::string& part : comm.gather(bytes, 0)) {
    std::vector<StepTiming>& timings = gathered.emplace_back(part.size() / sizeof(StepTiming));
    std::memcpy(timings.data(), part.data(), part.size());
  }
  return gathered;
}

}  // namespace annulus
