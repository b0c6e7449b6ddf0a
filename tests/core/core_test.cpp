// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/enums.hpp>
#include <annulus/core/error.hpp>
#include <annulus/core/problem.hpp>
#include <annulus/core/unwinding.hpp>
#include <annulus_test.hpp>

#include <cstdint>
#include <limits>
#include <set>
#include <stdexcept>
#include <string_view>

using namespace annulus;

namespace {

/// Every name is its own, is printed for the value that it was read as, and stands in the list of names.
template <class Enum>
void check_names() {
  std::set<std::string_view> names;
  std::set<Enum> values;
  const std::string list = names_of<Enum>();
  for (const auto& [value, name] : EnumNames<Enum>::values) {
    INFO(name);
    CHECK(names.insert(name).second);
    CHECK(values.insert(value).second);
    CHECK(to_string(value) == name);
    CHECK(from_string<Enum>(name) == value);
    CHECK(list.find(name) != std::string::npos);
  }
  CHECK_FALSE(from_string<Enum>("").has_value());
  CHECK_FALSE(from_string<Enum>("no such name").has_value());
}

struct Watched {
  bool& was_unwinding;
  Unwinding since_made;
  explicit Watched(bool& noted) : was_unwinding(noted) {}
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;
  ~Watched() { was_unwinding = since_made.now(); }
};

}  // namespace

TEST_CASE("every choice has one name, printed as it is read") {
  check_names<DType>();
  check_names<OffsetRule>();
  check_names<HeadSplit>();
  check_names<Mixing>();
  check_names<Ragged>();
  check_names<PartitionKind>();
  check_names<Schedule>();
  check_names<TransportKind>();
  check_names<BackendKind>();
  check_names<KernelKind>();
  check_names<MemoryPooling>();
}

TEST_CASE("narrowing keeps what fits and refuses the rest") {
  CHECK(checked_narrow<int>(std::int64_t{std::numeric_limits<int>::max()}) == std::numeric_limits<int>::max());
  CHECK(checked_narrow<int>(std::int64_t{std::numeric_limits<int>::min()}) == std::numeric_limits<int>::min());
  CHECK_THROWS_AS(checked_narrow<int>(std::int64_t{1} << 31), AssertionFailure);
  CHECK_THROWS_AS(checked_narrow<std::uint32_t>(std::int64_t{-1}), AssertionFailure);
  CHECK_THROWS_AS(checked_narrow<std::int64_t>(std::numeric_limits<std::uint64_t>::max()), AssertionFailure);
}

TEST_CASE("who made the mistake decides the exit code") {
  CHECK(InvalidArgument("x").code() == ExitCode::bad_input);
  CHECK(NotCompiled("x").code() == ExitCode::bad_input);
  CHECK(RuntimeFailure("x").code() == ExitCode::runtime_failure);
  CHECK(AssertionFailure("x").code() == ExitCode::runtime_failure);
  CHECK_THROWS_WITH([] { ANNULUS_EXPECTS(1 > 2, "found {}, allowed {}", 1, 2); }(), "found 1, allowed 2");
  CHECK_THROWS_AS([] { ANNULUS_ASSERT(1 > 2, "{}", 1); }(), AssertionFailure);
}

TEST_CASE("a destructor knows an exception that came after its owner was made") {
  bool unwinding_noted = true;
  { const Watched watched(unwinding_noted); }
  CHECK_FALSE(unwinding_noted);
  try {
    const Watched watched(unwinding_noted);
    throw std::runtime_error("on its way");
  } catch (const std::runtime_error&) {
    CHECK(unwinding_noted);
    CHECK_FALSE(unwinding());
    const Watched inside(unwinding_noted);  // of an exception that has been caught it knows nothing
  }
  CHECK_FALSE(unwinding_noted);
}

TEST_CASE("a pattern and a problem that cannot be are refused") {
  Problem problem;
  CHECK_NOTHROW(validate(problem));
  problem.kv_heads = 3;
  CHECK_THROWS_AS(validate(problem), InvalidArgument);
  problem.kv_heads = problem.heads;
  problem.head_dim = kMaxHeadDim + 1;
  CHECK_THROWS_AS(validate(problem), InvalidArgument);
  Pattern pattern = dense_pattern(8);
  CHECK_NOTHROW(validate(pattern));
  pattern.branches.front().dilation_rate = 0;
  CHECK_THROWS_AS(validate(pattern), InvalidArgument);
}
