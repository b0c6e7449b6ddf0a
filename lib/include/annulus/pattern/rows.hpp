// SPDX-License-Identifier: Apache-2.0
// Row sets that say which space their numbers live in, so that a row of a shard cannot be taken for a row of the sequence.
#pragma once

#include <annulus/core/error.hpp>
#include <annulus/pattern/progression.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace annulus {

/// The spaces of row numbers.
struct Global {};  ///< tokens of the sequence
struct Local {};   ///< rows of one rank's shard
struct Packed {};  ///< rows of a KV block, as it lies in a message

/// A short list of runs, each a progression, in the order in which the rows are numbered. One run needs no memory of its own.
template <class Space>
class Rows {
 public:
  Rows() = default;
  explicit Rows(const Progression& run) { append(run); }

  /// Adds the rows of `run` after those there are; nothing if it is empty.
  void append(const Progression& run) {
    if (run.empty()) { return; }
    if (runs_++ == 0) {
      first_ = run;
    } else {
      more_.push_back(run);
    }
  }

  bool empty() const { return runs_ == 0; }
  std::int64_t runs() const { return runs_; }
  const Progression& run(std::int64_t index) const { return index == 0 ? first_ : more_[static_cast<std::size_t>(index) - 1]; }
  /// The run of a set that has no more than one; an empty progression of an empty set.
  const Progression& only() const {
    ANNULUS_ASSERT(runs_ <= 1, "{} runs of rows where one is expected", runs_);
    return first_;
  }

  std::int64_t count() const {
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < runs_; ++i) { sum += run(i).count; }
    return sum;
  }
  /// The row numbered `index`, 0 <= index < count().
  std::int64_t operator[](std::int64_t index) const {
    std::int64_t i = 0;
    while (index >= run(i).count) { index -= run(i++).count; }
    return run(i)[index];
  }
  bool contains(std::int64_t row) const {
    for (std::int64_t i = 0; i < runs_; ++i) {
      if (run(i).contains(row)) { return true; }
    }
    return false;
  }

  /// The largest row of a non-empty set whose runs ascend.
  std::int64_t last() const { return run(runs_ - 1).last(); }

  bool operator==(const Rows&) const = default;

 private:
  Progression first_;
  std::vector<Progression> more_;
  std::int64_t runs_ = 0;
};

/// The rows of `rows` that lie in `other`, run by run.
template <class Space>
Rows<Space> intersect(const Rows<Space>& rows, const Progression& other) {
  Rows<Space> common;
  for (std::int64_t i = 0; i < rows.runs(); ++i) { common.append(intersect(rows.run(i), other)); }
  return common;
}

}  // namespace annulus
