// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/transport/make_transport.hpp>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace annulus {

namespace {

using Moment = std::shared_ptr<Event>;

/// One copied message: when its copy began and ended on the hub's queue.
struct Copy {
  std::int64_t bytes = 0;
  Moment begun;
  Moment ended;
};

/// One side of a message that waits for the other.
struct Half {
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  std::int64_t bytes = 0;
  Moment ready;  ///< the poster's queue at ready()
};

/// Where the virtual ranks' messages meet; copies run on its own queue, so that they overlap with work.
class Hub {
 public:
  explicit Hub(Device& device) : device_(device), queue_(device.make_queue()) {}

  Moment mark(Queue& queue) { return device_.record(queue); }

  void offer(std::int64_t step, std::int64_t source, std::int64_t target, const Half& half) {
    const auto key = std::make_tuple(step, source, target);
    const auto other = waiting_.find(key);
    if (other == waiting_.end()) {
      waiting_.emplace(key, half);
      return;
    }
    const Half& sender = half.source != nullptr ? half : other->second;
    const Half& receiver = half.source != nullptr ? other->second : half;
    ANNULUS_ASSERT(sender.source != nullptr && receiver.target != nullptr && sender.bytes == receiver.bytes,
                   "step {}: rank {} sends {} bytes to rank {}, which expects {}", step, source, sender.bytes, target, receiver.bytes);
    device_.wait(*queue_, *sender.ready);
    device_.wait(*queue_, *receiver.ready);
    Copy copy;
    copy.bytes = sender.bytes;
    copy.begun = device_.record(*queue_);
    device_.copy(*queue_, receiver.target, sender.source, sender.bytes);
    copy.ended = device_.record(*queue_);
    waiting_.erase(other);
    copies_[key] = std::move(copy);
  }

  const Copy& copied(std::int64_t step, std::int64_t source, std::int64_t target) const {
    const auto found = copies_.find(std::make_tuple(step, source, target));
    ANNULUS_ASSERT(found != copies_.end(), "step {}: the message from rank {} to rank {} was not posted by both", step, source, target);
    return found->second;
  }

  void await(Queue& queue, const Copy& copy) { device_.wait(queue, *copy.ended); }

 private:
  Device& device_;
  std::unique_ptr<Queue> queue_;
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Half> waiting_;
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Copy> copies_;  ///< the latest of each (step, source, target)
};

class LoopbackTransport final : public Transport {
 public:
  LoopbackTransport(std::shared_ptr<Hub> hub, std::int64_t rank, std::int64_t ranks) : hub_(std::move(hub)), rank_(rank), ranks_(ranks) {}

  TransportKind kind() const override { return TransportKind::loopback; }
  std::int64_t rank() const override { return rank_; }
  std::int64_t ranks() const override { return ranks_; }

  void ready(std::int64_t step, Queue& queue) override { posted_[step] = {hub_->mark(queue), {}, {}}; }

  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override {
    Posted& posted = posted_.at(step);
    for (const Incoming& message : receives) {
      posted.sources.push_back(message.peer);
      hub_->offer(step, message.peer, rank_, {nullptr, message.data, message.bytes, posted.at});
    }
    for (const Outgoing& message : sends) {
      posted.targets.push_back(message.peer);
      hub_->offer(step, rank_, message.peer, {message.data, nullptr, message.bytes, posted.at});
    }
  }

  void wait(std::int64_t step, Queue& queue) override {
    const Posted& posted = posted_.at(step);
    for (const std::int64_t source : posted.sources) { hub_->await(queue, hub_->copied(step, source, rank_)); }
    for (const std::int64_t target : posted.targets) { hub_->await(queue, hub_->copied(step, rank_, target)); }
  }

  StepTraffic traffic(std::int64_t step) override {
    StepTraffic traffic;
    const Posted& posted = posted_.at(step);
    const Moment& origin = posted_.at(1).at;
    const auto note = [&](const Copy& copy) {
      copy.ended->synchronize();
      const double begin = copy.begun->ms_since(*origin);
      traffic.begin_ms = traffic.end_ms > 0 ? std::min(traffic.begin_ms, begin) : begin;
      traffic.end_ms = std::max(traffic.end_ms, copy.ended->ms_since(*origin));
      traffic.communication_ms = std::max(traffic.communication_ms, copy.ended->ms_since(*posted.at));
      return copy.bytes;
    };
    for (const std::int64_t source : posted.sources) { traffic.bytes_received += note(hub_->copied(step, source, rank_)); }
    for (const std::int64_t target : posted.targets) { traffic.bytes_sent += note(hub_->copied(step, rank_, target)); }
    return traffic;
  }

 private:
  struct Posted {
    Moment at;
    std::vector<std::int64_t> sources;
    std::vector<std::int64_t> targets;
  };

  std::shared_ptr<Hub> hub_;
  std::int64_t rank_;
  std::int64_t ranks_;
  std::map<std::int64_t, Posted> posted_;
};

}  // namespace

std::vector<std::unique_ptr<Transport>> make_loopback_transports(std::int64_t ranks, Device& device) {
  ANNULUS_EXPECTS(ranks >= 1, "{} virtual ranks are not positive", ranks);
  const auto hub = std::make_shared<Hub>(device);
  std::vector<std::unique_ptr<Transport>> transports;
  for (std::int64_t rank = 0; rank < ranks; ++rank) { transports.push_back(std::make_unique<LoopbackTransport>(hub, rank, ranks)); }
  return transports;
}

}  // namespace annulus
