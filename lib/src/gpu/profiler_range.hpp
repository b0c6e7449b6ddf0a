// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace annulus {

/// Opens a range of the calling thread on the timeline of NVIDIA's profilers, and closes the innermost one. They cost nothing without a
/// profiler, and are nothing in a build without CUDA. The name is copied.
void push_profiler_range(const char* name) noexcept;
void pop_profiler_range() noexcept;

/// A range that ends with its scope.
class ProfilerRange {
 public:
  explicit ProfilerRange(const char* name) noexcept { push_profiler_range(name); }
  ProfilerRange(const ProfilerRange&) = delete;
  ProfilerRange& operator=(const ProfilerRange&) = delete;
  ~ProfilerRange() { pop_profiler_range(); }
};

}  // namespace annulus
