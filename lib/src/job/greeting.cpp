// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/greeting.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>

namespace annulus {

namespace {

constexpr std::string_view kMagic{"annulus\0", 8};
constexpr std::size_t kVersionBytes = 24;
constexpr std::size_t kGitBytes = 32;
static_assert(kMagic.size() + kVersionBytes + kGitBytes == sizeof(Greeting));

/// The text of a field: up to its first NUL, what does not print replaced, since anybody may have sent it.
std::string text_at(const Greeting& greeting, std::size_t begin, std::size_t size) {
  std::string text(greeting.data() + begin, size);
  text.resize(std::min(text.size(), text.find('\0')));
  std::replace_if(text.begin(), text.end(), [](char letter) { return letter < ' ' || letter > '~'; }, '?');
  return text;
}

std::string name_of(const Greeting& greeting) {
  if (std::string_view(greeting.data(), kMagic.size()) != kMagic) { return "a program that does not greet as annulus does"; }
  return fmt::format("annulus {} ({})", text_at(greeting, kMagic.size(), kVersionBytes),
                     text_at(greeting, kMagic.size() + kVersionBytes, kGitBytes));
}

}  // namespace

Greeting greeting_of(std::string_view version, std::string_view git) {
  Greeting greeting{};
  std::ranges::copy(kMagic, greeting.begin());
  std::ranges::copy(version.substr(0, kVersionBytes), greeting.begin() + kMagic.size());
  std::ranges::copy(git.substr(0, kGitBytes), greeting.begin() + kMagic.size() + kVersionBytes);
  return greeting;
}

std::optional<std::string> difference_of(std::span<const Greeting> greetings) {
  for (std::size_t rank = 1; rank < greetings.size(); ++rank) {
    if (greetings[rank] == greetings[0]) { continue; }
    return fmt::format("rank 0 runs {} and rank {} runs {}; all ranks must run the same program", name_of(greetings[0]), rank,
                       name_of(greetings[rank]));
  }
  return std::nullopt;
}

}  // namespace annulus
