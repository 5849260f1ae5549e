// Reads an image and makes of it what a model of litedetr takes: the same numbers as the Python package, whose resize
// is Pillow's.  Binary PPM always; JPEG where the program is built with libjpeg (the EXIF orientation is not applied).
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#ifdef LITEDETR_JPEG
#include <jpeglib.h>
#endif

struct Image {
  int width = 0, height = 0;
  std::vector<uint8_t> pixels;  // [height, width, 3] RGB
};

constexpr int kLargestSide = 32768;  // pixels; more is a damaged header

inline Image read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  Image image;
  int largest = 0;
  const auto number = [&](int& value) {
    while ((file >> std::ws).peek() == '#') file.ignore(1 << 20, '\n');
    file >> value;
  };
  file >> magic;
  number(image.width), number(image.height), number(largest);
  file.get();  // one white space
  const auto is_side = [](int side) { return side > 0 && side <= kLargestSide; };
  if (!file || !is_side(image.width) || !is_side(image.height) || largest != 255)
    throw std::runtime_error("the image " + path + " has a damaged header: it must be a PPM of 8 bits (P6, 255)");
  image.pixels.resize(size_t(3) * image.width * image.height);
  if (!file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size()))
    throw std::runtime_error("the image " + path + " is incomplete: copy it again");
  return image;
}

#ifdef LITEDETR_JPEG
struct JpegError : jpeg_error_mgr {
  std::jmp_buf back;
  char message[JMSG_LENGTH_MAX] = "it is damaged or incomplete";
};

// Returns whether the image is whole.  What has a destructor is the caller's: an error jumps out of libjpeg.
inline bool decode_jpeg(FILE* file, Image& image, JpegError& error) {
  jpeg_decompress_struct jpeg{};
  jpeg.err = jpeg_std_error(&error);
  error.output_message = [](j_common_ptr) {};
  error.error_exit = [](j_common_ptr info) {
    auto* failed = static_cast<JpegError*>(info->err);
    info->err->format_message(info, failed->message);
    std::longjmp(failed->back, 1);
  };
  if (setjmp(error.back)) {
    jpeg_destroy_decompress(&jpeg);
    return false;
  }
  jpeg_create_decompress(&jpeg);
  jpeg_stdio_src(&jpeg, file);
  jpeg_read_header(&jpeg, TRUE);
  jpeg.out_color_space = JCS_RGB;
  jpeg_start_decompress(&jpeg);
  image.width = jpeg.output_width, image.height = jpeg.output_height;
  image.pixels.resize(size_t(3) * image.width * image.height);
  while (jpeg.output_scanline < jpeg.output_height) {
    uint8_t* row = image.pixels.data() + size_t(3) * image.width * jpeg.output_scanline;
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  const bool whole = error.num_warnings == 0;  // libjpeg fills what is missing with grey
  jpeg_destroy_decompress(&jpeg);
  return whole;
}

inline Image read_jpeg(const std::string& path) {
  Image image;
  JpegError error{};
  FILE* file = std::fopen(path.c_str(), "rb");
  const bool whole = file && decode_jpeg(file, image, error);
  if (file) std::fclose(file);
  if (!whole) throw std::runtime_error("the image " + path + " cannot be read: " + error.message);
  return image;
}
#endif

inline Image read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("the image " + path + " does not exist or cannot be opened: check the path");
  const int first = file.get(), second = file.get();
  if (first == 'P' && second == '6') return read_ppm(path);
#ifdef LITEDETR_JPEG
  if (first == 0xff && second == 0xd8) return read_jpeg(path);
  throw std::runtime_error(path + " is no image that this program reads: give a JPEG or a binary PPM (P6)");
#else
  throw std::runtime_error(path + " is no binary PPM (P6), and this program is built without libjpeg: convert it");
#endif
}

// One pass of Pillow's bilinear resize with antialiasing, in its fixed point, along `count` lines of `from` pixels.
inline void resample(const uint8_t* source, uint8_t* target, int from, int to, int count, size_t step, size_t line) {
  constexpr int kBits = 22;
  const double scale = double(from) / to, support = std::max(scale, 1.0);
  const size_t target_line = step == 3 ? size_t(3) * to : 3;
  std::vector<double> weights;
  std::vector<int> fixed;
  for (int x = 0; x < to; ++x) {
    const double centre = (x + 0.5) * scale;
    const int first = std::max(0, int(centre - support + 0.5)), last = std::min(from, int(centre + support + 0.5));
    double sum = 0;
    weights.clear(), fixed.clear();
    for (int i = first; i < last; ++i) {
      weights.push_back(std::max(0.0, 1 - std::abs((i - centre + 0.5) / support)));
      sum += weights.back();
    }
    for (double weight : weights) fixed.push_back(int(std::lround(weight / sum * (1 << kBits))));
    for (int row = 0; row < count; ++row)
      for (int channel = 0; channel < 3; ++channel) {
        const uint8_t* pixel = source + row * line + first * step + channel;
        int total = 1 << (kBits - 1);
        for (size_t i = 0; i < fixed.size(); ++i) total += fixed[i] * pixel[i * step];
        target[row * target_line + x * step + channel] = uint8_t(std::clamp(total >> kBits, 0, 255));
      }
  }
}

// [3, height, width] in 0..1, resized without regard to the aspect ratio.
inline std::vector<float> model_input(const Image& image, int width, int height) {
  std::vector<uint8_t> wide(size_t(3) * width * image.height), resized(size_t(3) * width * height);
  resample(image.pixels.data(), wide.data(), image.width, width, image.height, 3, size_t(3) * image.width);
  resample(wide.data(), resized.data(), image.height, height, width, size_t(3) * width, 3);
  std::vector<float> planes(resized.size());
  const size_t area = size_t(width) * height;
  for (size_t i = 0; i < planes.size(); ++i) planes[i % 3 * area + i / 3] = resized[i] / 255.0f;
  return planes;
}

// The (width, height) to which the official evaluation resizes: the shorter side 800, the longer one 1333 at most.
inline std::pair<int, int> official_size(int width, int height, int shortest = 800, int longest = 1333) {
  const double small = std::min(width, height), large = std::max(width, height);
  if (large / small * shortest > longest) shortest = std::max(1, int(std::nearbyint(longest * small / large)));
  const int other = int(shortest * large / small);
  return width < height ? std::pair(shortest, other) : std::pair(other, shortest);
}
