// SPDX-License-Identifier: Apache-2.0
// Of tests that run in one process without MPI.
#include "session.hpp"

int main(int argc, char** argv) { return annulus::test::run_session(argc, argv); }
