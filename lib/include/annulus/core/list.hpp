// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/error.hpp>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace annulus {

/// A vector whose elements are found by std::int64_t, as all extents and offsets are counted. A debug build checks that they are there.
template <class T>
class List : public std::vector<T> {
  using Base = std::vector<T>;

 public:
  using Base::Base;
  using Base::operator=;
  List() = default;
  explicit List(Base elements) : Base(std::move(elements)) {}

  typename Base::reference operator[](std::int64_t index) {
    check(index);
    return Base::operator[](static_cast<std::size_t>(index));
  }
  typename Base::const_reference operator[](std::int64_t index) const {
    check(index);
    return Base::operator[](static_cast<std::size_t>(index));
  }
  /// Checked in every build. @throws AssertionFailure
  typename Base::reference at(std::int64_t index) {
    require(index);
    return Base::operator[](static_cast<std::size_t>(index));
  }
  typename Base::const_reference at(std::int64_t index) const {
    require(index);
    return Base::operator[](static_cast<std::size_t>(index));
  }

 private:
  void require(std::int64_t index) const {
    ANNULUS_ASSERT(index >= 0 && index < std::ssize(*this), "there is no element {} of {}", index, this->size());
  }
  void check([[maybe_unused]] std::int64_t index) const {
#ifndef NDEBUG
    require(index);
#endif
  }
};

}  // namespace annulus
