// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/text.hpp>

#include <annulus_test.hpp>

#include <string>

using namespace annulus;

TEST_CASE("well-formed UTF-8 of every length is text, and its bounds are kept") {
  for (const char* text : {"", "plain", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbf",
                           "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf", "a\xc3\xa9z"}) {
    INFO(printable(text));
    CHECK(is_utf8(text));
    CHECK(printable(text) == text);
  }
  for (const char* bytes : {"\x80", "\xff", "\xc1\xbf", "\xc3", "\xc3z", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xe2\x82", "\xf0\x8f\xbf\xbf",
                            "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "a\xe9z"}) {
    INFO(printable(bytes));
    CHECK_FALSE(is_utf8(bytes));
  }
}

TEST_CASE("bytes that do not print are shown as numbers") {
  CHECK(printable("a\xff"
                  "b\n\x7f") == "a\\xffb\\x0a\\x7f");
  CHECK(printable(std::string_view("x\0y", 3)) == "x\\x00y");
  CHECK(printable("\xe2\x82") == "\\xe2\\x82");
}
