// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/figures.hpp>

#include <fmt/format.h>

#include <array>

namespace annulus {

namespace {

using Report = BenchReport;

constexpr std::array kFigures{
    Figure{"ranks", [](const Report& r) -> FigureValue { return r.ranks; }, {}, 0},
    Figure{"runs_on", [](const Report& r) -> FigureValue { return r.backend; }, {}, 0},
    Figure{"rows_checked", [](const Report& r) -> FigureValue { return r.check.rows_checked; }, {}, 0},
    Figure{"rms_error", [](const Report& r) -> FigureValue { return r.check.verdict.rms_error; }, {}, 0},
    Figure{"plain_rms_error", [](const Report& r) -> FigureValue { return r.check.verdict.plain_rms_error; }, {}, 0},
    Figure{"median_ms", [](const Report& r) -> FigureValue { return r.median_ms; }, "median", 10},
    Figure{"min_ms", [](const Report& r) -> FigureValue { return r.min_ms; }, "min", 10},
    Figure{"p95_ms", [](const Report& r) -> FigureValue { return r.p95_ms; }, "p95", 10},
    Figure{"repetitions", [](const Report& r) -> FigureValue { return std::ssize(r.samples_ms); }, {}, 0},
    Figure{"flops", [](const Report& r) -> FigureValue { return r.flops; }, {}, 0},
    Figure{"backward_ms", [](const Report& r) -> FigureValue { return r.backward_ms; }, {}, 0},
    Figure{"backward_tflops_per_rank", [](const Report& r) -> FigureValue { return r.backward_tflops_per_rank; }, {}, 0},
    Figure{"tflops_per_rank", [](const Report& r) -> FigureValue { return r.tflops_per_rank; }, "TFLOP/s/rank", 12, 4},
    Figure{"communication_ms", [](const Report& r) -> FigureValue { return r.run.communication_ms; }, "comm", 10},
    Figure{"exposed_ms", [](const Report& r) -> FigureValue { return r.run.exposed_ms; }, "exposed", 10},
    Figure{"skew_ms", [](const Report& r) -> FigureValue { return r.run.skew_ms; }, {}, 0},
    Figure{"bytes_received", [](const Report& r) -> FigureValue { return r.bytes_received; }, "received B", 14},
    Figure{"blocks_alone_ms", [](const Report& r) -> FigureValue { return r.blocks_alone_ms; }, {}, 0},
    Figure{"overlap_efficiency", [](const Report& r) -> FigureValue { return r.overlap_efficiency; }, "overlap", 8, 3, true},
    Figure{"fma_peak_gflops", [](const Report& r) -> FigureValue { return r.fma_peak_gflops; }, {}, 0},
    Figure{"product_tflops", [](const Report& r) -> FigureValue { return r.product_tflops; }, {}, 0},
    Figure{"of_peak", [](const Report& r) -> FigureValue { return r.of_peak; }, "of peak", 8, 3, true},
    Figure{"of_cycles", [](const Report& r) -> FigureValue { return r.of_cycles; }, "of cycles", 9, 3, true},
    Figure{"predicted_ms", [](const Report& r) -> FigureValue { return r.predicted_ms; }, "predicted", 10, 3, true},
    Figure{"prediction_error", [](const Report& r) -> FigureValue { return r.prediction_error; }, "pred err", 8, 3, true},
    Figure{"error_ratio", [](const Report& r) -> FigureValue { return r.check.verdict.ratio; }, "error", 6, 2},
    Figure{"memory_high_water", [](const Report& r) -> FigureValue { return r.memory_high_water; }, {}, 0},
};

}  // namespace

std::span<const Figure> figures() { return kFigures; }

std::string table_text(const Figure& figure, const BenchReport& report) {
  const FigureValue value = figure.get(report);
  const double* const number = std::get_if<double>(&value);
  if (number == nullptr) {
    return std::visit([](const auto& held) { return fmt::format("{}", held); }, value);
  }
  return figure.may_lack && *number == 0 ? "-" : fmt::format("{:.{}f}", *number, figure.decimals);
}

}  // namespace annulus
