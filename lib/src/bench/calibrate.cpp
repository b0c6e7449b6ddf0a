// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/calibrate.hpp>

#include <annulus/bench/statistics.hpp>
#include <annulus/core/error.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/session/session.hpp>
#include <annulus/transport/make_transport.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <span>
#include <utility>
#include <vector>

namespace annulus {

namespace {

constexpr int kSamples = 7;
constexpr int kWarmup = 2;
constexpr double kUsPerMs = 1e3;

/// Median over samples of the slowest rank's time. `time()` gives a rank's milliseconds. Collective.
double slowest_median_ms(const Communicator& comm, const std::function<double()>& time) {
  std::vector<double> samples;
  for (int i = 0; i < kWarmup + kSamples; ++i) {
    comm.barrier();
    const double ms = comm.max(time());
    if (i >= kWarmup) { samples.push_back(ms); }
  }
  return median(samples);
}

/// A configuration in which every rank attends segments of its own, `segments` of `rows` rows that lie `rate` apart, and nothing travels.
Config whole_segments(const Config& asked, std::int64_t ranks, std::int64_t rows, std::int64_t segments, kernels::Mask mask,
                      std::int64_t rate = 1) {
  Config config = asked;
  config.input.clear();
  config.layer.reset();
  config.virtual_ranks = 1;
  config.grid = Grid();
  config.partition = PartitionKind::contiguous;
  config.schedule = Schedule::ring;
  config.pattern = Pattern();
  config.problem.batch = 1;
  config.problem.kv_lengths.clear();
  config.problem.seq_len = ranks * segments * rows * rate;
  config.pattern.branches = {{rows * rate, rate}};
  switch (mask) {
    case kernels::Mask::none:
      config.problem.causal = false;
      break;
    case kernels::Mask::causal:
      config.problem.causal = true;
      break;
  }
  return config;
}

/// What the work of a configuration takes on the slowest rank, and comes to on each.
struct Work {
  double ms = 0;
  double flops = 0;
  double partial_bytes = 0;
  double partials_ms = 0;  ///< what the run took besides
};

Work time_work(const Config& config, const Communicator& comm) {
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  Work work;
  work.ms = slowest_median_ms(comm, [&] {
    session.run();
    return session.local_timings().front().front().compute_ms;
  });
  work.partials_ms = slowest_median_ms(comm, [&] {
    session.run();
    return session.slowest_ms() - session.local_timings().front().front().compute_ms;
  });
  const RingPlan& plan = session.executors().front()->plan();
  work.flops = plan_cost(plan).flops;
  work.partial_bytes = static_cast<double>(whole_partials_bytes(plan.problem, sizes_of(plan), 4));
  return work;
}

std::vector<std::int64_t> sizes_of_transfers() {
  std::vector<std::int64_t> sizes;
  for (std::int64_t bytes = 4096; bytes <= std::int64_t{64} << 20; bytes *= 4) { sizes.push_back(bytes); }
  return sizes;
}

/// A time that is never 0, which a clock may say of what is short.
double us_of(double ms) { return std::max(ms * kUsPerMs, 1e-3); }

/// Makes later times no shorter than earlier ones: what is larger does not take less.
TransferTable table_of(std::vector<TransferTime> times) {
  for (std::size_t i = 1; i < times.size(); ++i) { times[i].us = std::max(times[i].us, times[i - 1].us); }
  return TransferTable(std::move(times));
}

TransferTable time_copies(Session& session, const Communicator& comm) {
  Device& device = session.device();
  const std::unique_ptr<Queue> queue = device.make_queue();
  std::vector<TransferTime> times;
  for (const std::int64_t bytes : sizes_of_transfers()) {
    Buffer from;
    Buffer to;
    together(comm, [&] {
      from = device.allocate(bytes, MemoryUse::tensor);
      to = device.allocate(bytes, MemoryUse::tensor);
    });
    const double ms = slowest_median_ms(comm, [&] {
      const std::shared_ptr<Event> begin = device.record(*queue);
      device.copy(*queue, to.get(), from.get(), bytes);
      const std::shared_ptr<Event> end = device.record(*queue);
      queue->synchronize();
      return end->ms_since(*begin);
    });
    times.push_back({bytes, us_of(ms)});
  }
  return table_of(std::move(times));
}

/// Times messages that every rank sends `distance` ranks on and gets from as far before, all at once, over the job's transport.
class LinkTimer {
 public:
  LinkTimer(Session& session, const Communicator& comm, std::int64_t distance)
      : comm_(comm), device_(session.device()), queue_(device_.make_queue()) {
    const Config& config = session.resolved().config;
    const std::vector<std::int64_t> sizes = sizes_of_transfers();
    together(comm, [&] {
      transport_ = make_transport(session.transport_kind(), comm, device_, config.share_gpu);
      from_ = device_.allocate(sizes.back(), MemoryUse::slot);
      to_ = device_.allocate(sizes.back(), MemoryUse::slot);
    });
    const std::int64_t target = (comm.rank() + distance) % comm.size();
    const std::int64_t source = (comm.rank() + comm.size() - distance) % comm.size();
    steps_.emplace_back();
    for (const std::int64_t bytes : sizes) { steps_.push_back({{{target, from_.get(), bytes}}, {{source, to_.get(), bytes}}}); }
    fail_fast(comm, [&] { transport_->prepare(steps_); });
  }
  ~LinkTimer() { transport_.reset(); }
  LinkTimer(const LinkTimer&) = delete;
  LinkTimer& operator=(const LinkTimer&) = delete;

  TransferTable times() {
    std::vector<std::vector<double>> samples(steps_.size());
    fail_fast(comm_, [&] {
      for (int i = 0; i < kWarmup + kSamples; ++i) {
        for (std::int64_t step = 1; step < std::ssize(steps_); ++step) {
          const double ms = comm_.max(pass(step, {}));
          if (i >= kWarmup) { samples[static_cast<std::size_t>(step)].push_back(ms); }
        }
      }
    });
    std::vector<TransferTime> times;
    for (std::size_t step = 1; step < steps_.size(); ++step) {
      times.push_back({steps_[step].sends.front().bytes, us_of(median(samples[step]))});
    }
    return table_of(std::move(times));
  }

  /// Whether a message goes on while its ranks do something else for longer than it takes. @param alone_us  what the largest takes
  Transfers progress(double alone_us) {
    const auto work = std::chrono::duration<double, std::micro>(1.5 * alone_us);
    const auto busy = [&] {
      const auto begin = std::chrono::steady_clock::now();
      while (std::chrono::steady_clock::now() - begin < work) {}
    };
    std::vector<double> waited;
    fail_fast(comm_, [&] {
      for (int i = 0; i < kSamples; ++i) {
        for (std::int64_t step = 1; step < std::ssize(steps_); ++step) {
          const bool largest = step + 1 == std::ssize(steps_);
          const double ms = comm_.max(pass(step, largest ? std::function<void()>(busy) : std::function<void()>()));
          if (largest) { waited.push_back(ms); }
        }
      }
    });
    return median(waited) * kUsPerMs < 0.5 * alone_us ? Transfers::beside_work : Transfers::in_wait;
  }

 private:
  /// Milliseconds of a step's messages, from post to completion or, if `between` is done after the post, from then.
  double pass(std::int64_t step, const std::function<void()>& between) {
    const StepMessages& messages = steps_[static_cast<std::size_t>(step)];
    comm_.barrier();
    std::shared_ptr<Event> begin = device_.record(*queue_);
    transport_->ready(step, *queue_);
    transport_->post(step, messages.sends, messages.receives);
    if (between) {
      between();
      begin = device_.record(*queue_);
    }
    transport_->wait(step, *queue_);
    const std::shared_ptr<Event> end = device_.record(*queue_);
    queue_->synchronize();
    transport_->traffic(step);
    return end->ms_since(*begin);
  }

  const Communicator& comm_;
  Device& device_;
  std::unique_ptr<Queue> queue_;
  Buffer from_;
  Buffer to_;
  std::unique_ptr<Transport> transport_;
  std::vector<StepMessages> steps_;
};

void time_links(Machine& machine, Session& session, const Communicator& comm) {
  const bool several_hosts = comm.min(comm.host_size()) < comm.size();
  if (machine.ranks_per_host > 1) {
    // Neighbours: of several hosts some are on two, and the slowest counts, so there it is asked of one host alone.
    ANNULUS_EXPECTS(!several_hosts || machine.ranks_per_host == 1,
                    "--calibrate on several hosts takes one rank on each; measure the link inside a host in a job of one");
    LinkTimer timer(session, comm, 1);
    machine.link_inside = timer.times();
    machine.transfers = session.device().host_memory() ? timer.progress(machine.link_inside.times().back().us) : Transfers::beside_work;
  }
  if (several_hosts) {
    LinkTimer timer(session, comm, 1);
    machine.link_between = timer.times();
    machine.transfers = session.device().host_memory() ? timer.progress(machine.link_between.times().back().us) : Transfers::beside_work;
  }
}

}  // namespace

Machine calibrate(const Config& asked, const Communicator& comm) {
  Machine machine;
  machine.ranks_per_host = comm.max(comm.host_size());
  together(comm, [&] {
    ANNULUS_EXPECTS(machine.ranks_per_host == 1 || machine.ranks_per_host == comm.size(),
                    "--calibrate on several hosts takes one rank on each; measure the link inside a host in a job of one");
  });

  Config tiny = whole_segments(asked, comm.size(), 1, 1, kernels::Mask::none);
  tiny.problem.heads = tiny.problem.kv_heads = 1;
  machine.launch_gap_us = kUsPerMs * time_work(tiny, comm).ms;

  // A rank of many short blocks, as of few long ones.
  const std::int64_t least_tokens = asked.backend == BackendKind::cuda ? 65536 : 4096;
  const std::int64_t most_rows = asked.backend == BackendKind::cuda ? 65536 : 8192;
  ResolvedConfig resolved;
  std::vector<TransferTime> partials;
  constexpr std::int64_t kDilated = 4;
  for (const auto& [mask, rate] : {std::pair{kernels::Mask::none, std::int64_t{1}}, std::pair{kernels::Mask::causal, std::int64_t{1}},
                                   std::pair{kernels::Mask::none, kDilated}, std::pair{kernels::Mask::causal, kDilated}}) {
    BlockRates rates;
    rates.mask = mask;
    rates.dilation_rate = rate;
    for (std::int64_t rows = 32; rows <= (rate == 1 ? most_rows : most_rows / 4); rows *= 2) {
      const std::int64_t segments = std::max<std::int64_t>(1, least_tokens / rows);
      const Config config = whole_segments(asked, comm.size(), rows, segments, mask, rate);
      const Work work = time_work(config, comm);
      const double ms = std::max(work.ms - machine.launch_gap_us / kUsPerMs, 1e-6);
      rates.rates.push_back({rows, work.flops / ms / 1e6});
    }
    machine.block_rates.push_back(std::move(rates));
  }

  for (std::int64_t tokens = 1024; tokens <= 16 * least_tokens; tokens *= 4) {
    const Work work = time_work(whole_segments(asked, comm.size(), 32, tokens / 32, kernels::Mask::none), comm);
    partials.push_back({static_cast<std::int64_t>(work.partial_bytes), us_of(work.partials_ms)});
  }
  machine.partials = table_of(std::move(partials));

  resolved = resolve(whole_segments(asked, comm.size(), least_tokens, 1, kernels::Mask::none), comm);
  Session session(resolved, comm);
  for (BlockRates& rates : machine.block_rates) {
    rates.dtype = session.problem().dtype;
    rates.head_dim = session.problem().head_dim;
  }
  machine.memory_bytes = comm.min(session.device().available_bytes()) / comm.max(comm.host_size());
  machine.transfers = session.device().host_memory() ? Transfers::in_wait : Transfers::beside_work;
  machine.copy = time_copies(session, comm);
  if (comm.size() > 1) { time_links(machine, session, comm); }
  machine.name = fmt::format("{} rank{} of {}", comm.size(), comm.size() == 1 ? "" : "s", session.kernel().describe());
  validate(machine);
  return machine;
}

}  // namespace annulus
