// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/cost.hpp>

#include "routes/walk.hpp"

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

namespace annulus {

namespace {

using planning::Setting;
using planning::Walk;

/// What one rank sends in each step.
class SentBytes {
 public:
  void add(std::int64_t step, std::int64_t bytes) {
    if (step >= std::ssize(bytes_)) { bytes_.resize(static_cast<std::size_t>(step) + 1, 0); }
    bytes_[static_cast<std::size_t>(step)] += static_cast<double>(bytes);
  }
  /// Takes the larger of both in each step, and gives up its own.
  void move_largest_to(std::vector<double>& busiest) {
    busiest.resize(std::max(busiest.size(), bytes_.size()), 0);
    for (std::size_t step = 0; step < bytes_.size(); ++step) { busiest[step] = std::max(busiest[step], bytes_[step]); }
    std::fill(bytes_.begin(), bytes_.end(), 0);
  }
  double sum() const {
    double all = 0;
    for (const double bytes : bytes_) { all += bytes; }
    return all;
  }

 private:
  std::vector<double> bytes_;
};

}  // namespace

double busiest_sender_share(const Problem& problem, const Pattern& pattern, const Partition& partition) {
  const Routing routing{.schedule = Schedule::direct};
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Walk> walks;
  std::vector<double> busiest;
  double all = 0;
  SentBytes own;
  for (std::int64_t rank = 0; rank < partition.ranks(); ++rank) {
    const Setting setting = planning::make_setting(problem, pattern, partition, routing, rank);
    for_each_cut_segment(setting, [&](std::int64_t branch, std::int64_t head_class, std::int64_t segment) {
      const std::tuple key(branch, head_class, segment);
      auto found = walks.find(key);
      if (found == walks.end()) {
        found = walks.emplace(key, Walk(setting, branch, segment, setting.rows_of(branch, head_class, segment))).first;
      }
      const Walk& walk = found->second;
      const Walk::Member* const self = walk.member(rank);
      if (self == nullptr) { return; }
      const std::int64_t row_bytes = block_bytes(problem, 1, setting.heads(branch, head_class).kv.count);
      for (const std::int64_t number : {self->lower, self->upper}) {
        if (number < 0) { continue; }
        const std::int64_t bytes = walk.part(number).rows.count() * row_bytes;
        for (const Walk::Member& member : walk.members()) {
          if (walk.needs(member, number)) { own.add(walk.step(member, number), bytes); }
        }
      }
    });
    all += own.sum();
    own.move_largest_to(busiest);
  }
  double largest = 0;
  for (const double bytes : busiest) { largest += bytes; }
  return all == 0 ? 1.0 : largest * static_cast<double>(partition.ranks()) / all;
}

}  // namespace annulus
