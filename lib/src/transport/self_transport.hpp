// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/error.hpp>
#include <annulus/transport/transport.hpp>

namespace annulus {

/// One rank: nothing travels, and a message is a mistake of the plan.
class SelfTransport final : public Transport {
 public:
  TransportKind kind() const override { return TransportKind::self; }
  std::int64_t rank() const override { return 0; }
  std::int64_t ranks() const override { return 1; }
  void ready(std::int64_t /*step*/, Queue& /*queue*/) override {}
  void post(std::int64_t step, std::span<const Outgoing> sends, std::span<const Incoming> receives) override {
    ANNULUS_ASSERT(sends.empty() && receives.empty(), "step {}: one rank alone has {} messages to send", step, sends.size());
  }
  void wait(std::int64_t /*step*/, Queue& /*queue*/) override {}
  StepTraffic traffic(std::int64_t /*step*/) override { return {}; }
};

}  // namespace annulus
