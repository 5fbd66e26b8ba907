// Runs an image encoder that `tokcc compile --backend aoti` wrote: one float32 input, raw numbers in and out.
//
//   ./run out/model.aoti.pt2 images.f32 8 3 224 224 logits.f32
//
// Nothing of tokcc, and nothing of Python, is needed here: only libtorch.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read(const std::string& path, const std::vector<int64_t>& shape) {
  at::Tensor tensor = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(tensor.nbytes());
  if (!file.read(static_cast<char*>(tensor.data_ptr()), bytes) || file.peek() != EOF) {
    throw std::runtime_error(path + " does not hold " + std::to_string(bytes) + " bytes");
  }
  return tensor;
}

void write(const std::string& path, const at::Tensor& tensor) {
  const at::Tensor plain = tensor.contiguous();
  std::ofstream file(path, std::ios::binary);
  if (!file.write(static_cast<const char*>(plain.data_ptr()), static_cast<std::streamsize>(plain.nbytes()))) {
    throw std::runtime_error("cannot write " + path);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 5) {
    std::cerr << "usage: " << argv[0] << " MODEL.aoti.pt2 INPUT.f32 SIZE... OUTPUT.f32\n";
    return 2;
  }
  // Without it a batch of another size than the model's gives an answer of the model's size, and no error.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);
  std::vector<int64_t> shape;
  for (int i = 3; i < argc - 1; ++i) shape.push_back(std::stoll(argv[i]));

  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  // Inputs in the order of manifest.json, contiguous; outputs likewise.
  std::vector<at::Tensor> outputs = model.run({read(argv[2], shape)});
  std::cout << "cpu " << model.get_metadata().at("AOTI_CPU_ISA") << ", output " << outputs.at(0).sizes() << "\n";
  write(argv[argc - 1], outputs.at(0));
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
