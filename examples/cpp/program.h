// What both programs share: their options, and a line for each object.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Options {
  std::string model, library, labels;
  std::vector<std::string> images;
  double threshold = 0.3;
  int threads = 0;  // the runtime's choice
};

inline double number(const std::string& name, const std::string& text, double least, double most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value >= least && value <= most))
    throw std::invalid_argument(name + " is " + text + ", which is no number that it takes");
  return value;
}

// library: the option that names the library with the attention op; threads: whether there is an option for their
// number.
inline Options parse(int count, char** arguments, const std::string& library, bool threads) {
  Options options;
  std::vector<std::string> files;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name.rfind("--", 0) != 0) {
      files.push_back(name);
      continue;
    }
    if (++i == count) throw std::invalid_argument(name + " wants a value");
    const std::string value = arguments[i];
    if (name == library)
      options.library = value;
    else if (name == "--labels")
      options.labels = value;
    else if (name == "--threshold")
      options.threshold = number(name, value, 0, 1);
    else if (threads && name == "--threads")
      options.threads = int(number(name, value, 1, 4096));
    else
      throw std::invalid_argument("there is no option " + name);
  }
  if (files.size() < 2) throw std::invalid_argument("a model and at least one image are wanted");
  options.model = files[0];
  options.images.assign(files.begin() + 1, files.end());
  return options;
}

inline std::vector<std::string> read_labels(const std::string& path) {
  std::vector<std::string> names;
  if (path.empty()) return names;
  std::ifstream file(path);
  if (!file) throw std::runtime_error("the labels " + path + " cannot be opened: check the path");
  for (std::string line; std::getline(file, line);) names.push_back(line);
  return names;
}

// Prints image, label, score and x1 y1 x2 y2 in pixels of the image, with tabs between; the best score comes first.
inline void print(const std::string& image, int width, int height, const int64_t* labels, const float* boxes,
                  const float* scores, int64_t count, double threshold, const std::vector<std::string>& names) {
  for (int64_t i = 0; i < count && scores[i] >= threshold; ++i) {
    const bool known = labels[i] >= 0 && size_t(labels[i]) < names.size();
    const std::string label = known ? names[labels[i]] : std::to_string(labels[i]);
    std::printf("%s\t%s\t%.6f", image.c_str(), label.c_str(), scores[i]);
    for (int side = 0; side < 4; ++side)
      std::printf("\t%.3f", std::clamp(boxes[4 * i + side], 0.0f, float(side % 2 ? height : width)));
    std::printf("\n");
  }
}

// Runs `detect` on every image, those after one that fails too; returns the exit status.
template <class Detect>
int run(const Options& options, Detect detect) {
  int status = 0;
  for (const std::string& path : options.images) {
    try {
      detect(path);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "error: %s\n", error.what());
      status = 2;
    }
  }
  return status;
}

// The program: parses the options, calls `detect` with them, and says what is wrong in a sentence.
template <class Detect>
int start(int count, char** arguments, const std::string& library, bool threads, const char* usage, Detect detect) {
  try {
    return detect(parse(count, arguments, library, threads));
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "error: %s\n%s", error.what(), usage);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 2;
}
