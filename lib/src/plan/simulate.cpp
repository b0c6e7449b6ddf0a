// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/simulate.hpp>

#include <annulus/core/error.hpp>

#include "op_times.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <utility>

namespace annulus {

namespace {

constexpr double kNever = -1.0;

double us_in_ms(double us) { return us * 1e-3; }

/// A message on its way from a sender's step to a receiver's.
struct Passage {
  std::int64_t source = 0;
  std::int64_t target = 0;
  std::int64_t step = 0;
  std::int64_t bytes = 0;
  double duration_ms = 0;
  bool sender_posted = false;
  bool receiver_posted = false;
  double begin_ms = kNever;
  double end_ms = kNever;
};

/// What one rank is at.
struct Clock {
  std::size_t next_op = 0;
  double now_ms = 0;
  bool sends = false;                  ///< the port out is taken
  bool receives = false;               ///< the port in is taken
  std::vector<std::int64_t> outgoing;  ///< posted by both ends and not begun, in the order of posting
  std::vector<std::int64_t> incoming;  ///< the same
  bool waits = false;
  std::int64_t waits_for = -1;               ///< the step that it waits for, or waited for last
  List<double> posted_ms;                    ///< by step
  List<std::vector<std::int64_t>> passages;  ///< by step: what comes, then what goes
};

/// The moments of one step.
void note_work(StepTiming& timing, const Step& step, double begin_ms, double end_ms) {
  timing.compute_ms = end_ms - begin_ms;
  if (step.work.empty()) { return; }
  timing.work_begin_ms = begin_ms;
  timing.work_end_ms = end_ms;
}

void note_transfer(StepTiming& timing, double posted_ms, double begin_ms, double end_ms) {
  timing.communication_ms = std::max(timing.communication_ms, end_ms - posted_ms);
  // NaN is less than nothing: the first of the step.
  if (!(timing.transfer_begin_ms <= begin_ms)) { timing.transfer_begin_ms = begin_ms; }
  if (!(timing.transfer_end_ms >= end_ms)) { timing.transfer_end_ms = end_ms; }
}

/// Counts the moments of a rank from its post of step 1, as measured timings are.
void count_from(std::vector<StepTiming>& timings, double origin_ms) {
  for (StepTiming& timing : timings) {
    for (double* const moment : {&timing.work_begin_ms, &timing.work_end_ms, &timing.transfer_begin_ms, &timing.transfer_end_ms}) {
      *moment -= origin_ms;
    }
  }
}

void count_bytes(std::vector<StepTiming>& timings, const RingPlan& plan) {
  for (std::size_t step = 0; step < timings.size(); ++step) {
    for (const Message& message : plan.steps[static_cast<std::int64_t>(step)].sends) { timings[step].bytes_sent += message.bytes; }
    for (const Message& message : plan.steps[static_cast<std::int64_t>(step)].receives) { timings[step].bytes_received += message.bytes; }
  }
}

class Events {
 public:
  Events(std::span<const RingPlan> plans, const Machine& machine, std::int64_t first_rank) : plans_(plans), machine_(machine) {
    simulation_.timings.resize(plans.size());
    simulation_.rank_ms.resize(plans.size());
    for (const RingPlan& plan : plans) {
      Clock& clock = clocks_.emplace_back();
      const auto steps = static_cast<std::size_t>(std::ssize(plan.steps));
      clock.posted_ms.resize(steps, kNever);
      clock.passages.resize(steps);
      simulation_.timings[static_cast<std::size_t>(plan.rank)].resize(steps);
      for (std::int64_t step = 0; step < std::ssize(plan.steps); ++step) {
        for (const Message& message : plan.steps[step].receives) {
          Passage& passage = passages_.emplace_back(Passage{message.peer, plan.rank, step, message.bytes});
          const TransferTable& link = machine.link(first_rank + passage.source, first_rank + passage.target);
          passage.duration_ms = us_in_ms(link.us(static_cast<double>(message.bytes)));
          clock.passages[step].push_back(std::ssize(passages_) - 1);
        }
      }
    }
    // Senders come to know theirs from the receivers, whose lists are the same.
    for (std::int64_t number = 0; number < std::ssize(passages_); ++number) {
      const Passage& passage = passages_[number];
      ANNULUS_ASSERT(passage.step < std::ssize(clocks_[passage.source].passages), "rank {} expects a message of rank {} in step {}",
                     passage.target, passage.source, passage.step);
      clocks_[passage.source].passages[passage.step].push_back(number);
    }
  }

  Simulation run() {
    for (std::int64_t rank = 0; rank < std::ssize(clocks_); ++rank) {
      clocks_[rank].now_ms = planning::begin_ms(plan(rank), machine_);
      proceed(rank);
    }
    while (!events_.empty()) {
      const Event event = events_.top();
      events_.pop();
      if (event.kind == Event::Kind::message_ends) {
        end(passages_[event.number], event.time_ms);
      } else {
        execute(event.number);
      }
    }
    for (std::int64_t rank = 0; rank < std::ssize(clocks_); ++rank) {
      const Clock& clock = clocks_[rank];
      ANNULUS_ASSERT(clock.next_op == plan(rank).ops.size(), "rank {} waits for step {} for ever", rank, clock.waits_for);
      auto& timings = simulation_.timings[static_cast<std::size_t>(rank)];
      count_from(timings, std::ssize(timings) > 1 ? clock.posted_ms[1] : planning::begin_ms(plan(rank), machine_));
      count_bytes(timings, plan(rank));
      simulation_.rank_ms[static_cast<std::size_t>(rank)] = clock.now_ms;
      simulation_.total_ms = std::max(simulation_.total_ms, clock.now_ms);
    }
    return std::move(simulation_);
  }

 private:
  const RingPlan& plan(std::int64_t rank) const { return plans_[static_cast<std::size_t>(rank)]; }
  StepTiming& timing(std::int64_t rank, std::int64_t step) {
    return simulation_.timings[static_cast<std::size_t>(rank)][static_cast<std::size_t>(step)];
  }

  /// The rank's next op, which begins now.
  void execute(std::int64_t rank) {
    Clock& clock = clocks_[rank];
    const Op& op = plan(rank).ops[clock.next_op++];
    const Step& step = plan(rank).steps[op.step];
    switch (op.kind) {
      case OpKind::pack:
        clock.now_ms += planning::pack_ms(step, plan(rank), machine_);
        break;
      case OpKind::post:
        post(rank, op.step);
        break;
      case OpKind::wait:
        clock.waits = true;
        clock.waits_for = op.step;
        for (const std::int64_t number : clock.passages[op.step]) { start(number, clock.now_ms); }
        end_wait(rank, clock.now_ms);
        return;
      case OpKind::attend: {
        const double begin_ms = clock.now_ms;
        clock.now_ms += planning::attend_ms(step, plan(rank), machine_);
        note_work(timing(rank, op.step), step, begin_ms, clock.now_ms);
        break;
      }
      case OpKind::finish:
        clock.now_ms += planning::finish_ms(plan(rank), machine_);
        break;
      case OpKind::accumulate:
      case OpKind::differentiate:
      case OpKind::finish_gradients:  // predict() refuses them
        break;
    }
    proceed(rank);
  }

  void proceed(std::int64_t rank) {
    if (clocks_[rank].next_op < plan(rank).ops.size()) { events_.push({clocks_[rank].now_ms, Event::Kind::op_begins, rank}); }
  }

  void post(std::int64_t rank, std::int64_t step) {
    Clock& clock = clocks_[rank];
    clock.posted_ms[step] = clock.now_ms;
    for (const std::int64_t number : clock.passages[step]) {
      Passage& passage = passages_[number];
      (passage.source == rank ? passage.sender_posted : passage.receiver_posted) = true;
      if (!passage.sender_posted || !passage.receiver_posted) { continue; }
      clocks_[passage.source].outgoing.push_back(number);
      clocks_[passage.target].incoming.push_back(number);
      start(number, clock.now_ms);
    }
  }

  /// Begins a message if it can.
  void start(std::int64_t number, double now_ms) {
    Passage& passage = passages_[number];
    Clock& sender = clocks_[passage.source];
    Clock& receiver = clocks_[passage.target];
    const bool moves = machine_.transfers == Transfers::beside_work || (receiver.waits && receiver.waits_for == passage.step);
    if (!passage.sender_posted || !passage.receiver_posted || passage.begin_ms != kNever || !moves || sender.sends || receiver.receives) {
      return;
    }
    sender.sends = receiver.receives = true;
    std::erase(sender.outgoing, number);
    std::erase(receiver.incoming, number);
    passage.begin_ms = now_ms;
    events_.push({now_ms + passage.duration_ms, Event::Kind::message_ends, number});
  }

  /// Frees the ports of a message for those that were posted next.
  void end(Passage& passage, double now_ms) {
    passage.end_ms = now_ms;
    Clock& sender = clocks_[passage.source];
    Clock& receiver = clocks_[passage.target];
    sender.sends = receiver.receives = false;
    for (const std::int64_t rank : {passage.source, passage.target}) {
      note_transfer(timing(rank, passage.step), clocks_[rank].posted_ms[passage.step], passage.begin_ms, now_ms);
      end_wait(rank, now_ms);
    }
    for (std::size_t i = 0; i < sender.outgoing.size() && !sender.sends; ++i) { start(sender.outgoing[i], now_ms); }
    for (std::size_t i = 0; i < receiver.incoming.size() && !receiver.receives; ++i) { start(receiver.incoming[i], now_ms); }
  }

  /// Lets a rank go on that waits for messages which all have ended.
  void end_wait(std::int64_t rank, double now_ms) {
    Clock& clock = clocks_[rank];
    if (!clock.waits) { return; }
    for (const std::int64_t number : clock.passages[clock.waits_for]) {
      if (passages_[number].end_ms == kNever) { return; }
    }
    timing(rank, clock.waits_for).exposed_ms = now_ms - clock.now_ms;
    clock.now_ms = now_ms;
    clock.waits = false;
    proceed(rank);
  }

  struct Event {
    enum class Kind { message_ends, op_begins };
    double time_ms = 0;
    Kind kind = Kind::op_begins;
    std::int64_t number = 0;  ///< of a message or a rank
    auto operator<=>(const Event&) const = default;
  };

  std::span<const RingPlan> plans_;
  const Machine& machine_;
  List<Clock> clocks_;
  List<Passage> passages_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;  ///< the next one on top
  Simulation simulation_;
};

/// One process that takes the ops of its ranks in turn.
class Turns {
 public:
  Turns(std::span<const RingPlan> plans, const Machine& machine) : plans_(plans), machine_(machine), next_(plans.size(), 0) {
    simulation_.timings.resize(plans.size());
    simulation_.rank_ms.resize(plans.size());
    for (const RingPlan& plan : plans) {
      simulation_.timings[static_cast<std::size_t>(plan.rank)].resize(plan.steps.size());
      posted_ms_.emplace_back().resize(plan.steps.size(), kNever);
      arrived_ms_.emplace_back().resize(plan.steps.size(), 0);
    }
  }

  Simulation run() {
    for (const RingPlan& plan : plans_) { now_ms_ += planning::begin_ms(plan, machine_); }
    constexpr std::int64_t kEnd = std::numeric_limits<std::int64_t>::max();
    for (bool any = true; any;) {
      any = false;
      std::int64_t turn = kEnd;
      for (const RingPlan& plan : plans_) {
        if (const Op* const op = next_of(plan)) { turn = std::min(turn, op->turn); }
      }
      for (const RingPlan& plan : plans_) {
        for (const Op* op = next_of(plan); op != nullptr && op->turn == turn; op = next_of(plan)) {
          execute(plan, *op);
          ++next_[plan.rank];
          any = true;
        }
      }
    }
    for (const RingPlan& plan : plans_) {
      auto& timings = simulation_.timings[static_cast<std::size_t>(plan.rank)];
      count_from(timings, plan.steps.size() > 1 ? posted_ms_[plan.rank][1] : 0.0);
      count_bytes(timings, plan);
    }
    simulation_.total_ms = now_ms_;
    return std::move(simulation_);
  }

 private:
  const Op* next_of(const RingPlan& plan) const {
    const std::size_t next = next_[plan.rank];
    return next < plan.ops.size() ? &plan.ops[next] : nullptr;
  }

  void execute(const RingPlan& plan, const Op& op) {
    const Step& step = plan.steps[op.step];
    StepTiming& timing = simulation_.timings[static_cast<std::size_t>(plan.rank)][static_cast<std::size_t>(op.step)];
    const double begin_ms = now_ms_;
    switch (op.kind) {
      case OpKind::pack:
        now_ms_ += planning::pack_ms(step, plan, machine_);
        return;
      case OpKind::post:
        post(plan, op.step);
        return;
      case OpKind::wait:
        now_ms_ = std::max(now_ms_, arrived_ms_[plan.rank][op.step]);
        timing.exposed_ms = now_ms_ - begin_ms;
        return;
      case OpKind::attend:
        now_ms_ += planning::attend_ms(step, plan, machine_);
        note_work(timing, step, begin_ms, now_ms_);
        return;
      case OpKind::accumulate:
      case OpKind::differentiate:
      case OpKind::finish_gradients:  // predict() refuses them
      case OpKind::finish:
        break;
    }
    now_ms_ += planning::finish_ms(plan, machine_);
    simulation_.rank_ms[static_cast<std::size_t>(plan.rank)] = now_ms_;
  }

  /// Copies those of the step's messages that the other end has posted.
  void post(const RingPlan& plan, std::int64_t step) {
    posted_ms_[plan.rank][step] = now_ms_;
    const auto copy = [&](const Message& message) {
      if (step >= std::ssize(posted_ms_[message.peer]) || posted_ms_[message.peer][step] == kNever) { return; }
      double begin_ms = std::max(now_ms_, copies_end_ms_);
      copies_end_ms_ = begin_ms + us_in_ms(machine_.copy.us(static_cast<double>(message.bytes)));
      if (machine_.transfers == Transfers::in_wait) { now_ms_ = copies_end_ms_; }
      for (const std::int64_t rank : {plan.rank, message.peer}) {
        arrived_ms_[rank][step] = std::max(arrived_ms_[rank][step], copies_end_ms_);
        note_transfer(simulation_.timings[static_cast<std::size_t>(rank)][static_cast<std::size_t>(step)], posted_ms_[rank][step], begin_ms,
                      copies_end_ms_);
      }
    };
    for (const Message& message : plan.steps[step].receives) { copy(message); }
    for (const Message& message : plan.steps[step].sends) { copy(message); }
  }

  std::span<const RingPlan> plans_;
  const Machine& machine_;
  List<std::size_t> next_;
  double now_ms_ = 0;
  double copies_end_ms_ = 0;       ///< of those that are under way, one after another
  List<List<double>> posted_ms_;   ///< [rank][step]
  List<List<double>> arrived_ms_;  ///< [rank][step]
  Simulation simulation_;
};

}  // namespace

Simulation simulate(std::span<const RingPlan> plans, const Machine& machine, std::int64_t first_rank) {
  return Events(plans, machine, first_rank).run();
}

Simulation simulate_virtual_ranks(std::span<const RingPlan> plans, const Machine& machine) { return Turns(plans, machine).run(); }

Simulation simulate_among_equals(const RingPlan& plan, const std::vector<std::vector<double>>& busy_bytes, const Machine& machine,
                                 std::int64_t first_rank) {
  std::vector<StepTiming> timings(plan.steps.size());
  List<double> posted_ms;
  posted_ms.resize(plan.steps.size(), 0);
  const double began_ms = planning::begin_ms(plan, machine);
  double now_ms = began_ms;
  double in_free_ms = 0;
  double out_free_ms = 0;
  // The end of a message that could start at `from_ms`, through the rank's own port.
  const auto pass = [&](StepTiming& timing, std::int64_t step, std::int64_t peer, double bytes, double from_ms, double& port_free_ms) {
    const TransferTable& link = machine.link(first_rank + plan.rank, first_rank + peer);
    const double begin_ms = std::max(from_ms, port_free_ms);
    port_free_ms = begin_ms + us_in_ms(link.us(bytes));
    note_transfer(timing, posted_ms[step], begin_ms, port_free_ms);
    return port_free_ms;
  };
  for (const Op& op : plan.ops) {
    const Step& step = plan.steps[op.step];
    StepTiming& timing = timings[static_cast<std::size_t>(op.step)];
    const double begin_ms = now_ms;
    switch (op.kind) {
      case OpKind::pack:
        now_ms += planning::pack_ms(step, plan, machine);
        break;
      case OpKind::post:
        posted_ms[op.step] = now_ms;
        break;
      case OpKind::wait: {
        const double from_ms = machine.transfers == Transfers::in_wait ? now_ms : posted_ms[op.step];
        double end_ms = now_ms;
        for (std::size_t i = 0; i < step.receives.size(); ++i) {
          const Message& message = step.receives[i];
          // The sender's port has as much to do as it sends in the step.
          const double busy = busy_bytes.at(static_cast<std::size_t>(op.step)).at(i);
          const TransferTable& link = machine.link(first_rank + plan.rank, first_rank + message.peer);
          end_ms = std::max({end_ms, pass(timing, op.step, message.peer, static_cast<double>(message.bytes), from_ms, in_free_ms),
                             from_ms + us_in_ms(link.us(busy))});
        }
        for (const Message& message : step.sends) {
          end_ms = std::max(end_ms, pass(timing, op.step, message.peer, static_cast<double>(message.bytes), from_ms, out_free_ms));
        }
        timing.exposed_ms = end_ms - now_ms;
        now_ms = end_ms;
        break;
      }
      case OpKind::attend:
        now_ms += planning::attend_ms(step, plan, machine);
        note_work(timing, step, begin_ms, now_ms);
        break;
      case OpKind::finish:
        now_ms += planning::finish_ms(plan, machine);
        break;
      case OpKind::accumulate:
      case OpKind::differentiate:
      case OpKind::finish_gradients:  // predict() refuses them
        break;
    }
  }
  count_from(timings, plan.steps.size() > 1 ? posted_ms[1] : began_ms);
  count_bytes(timings, plan);
  return {{std::move(timings)}, {now_ms}, now_ms};
}

}  // namespace annulus
