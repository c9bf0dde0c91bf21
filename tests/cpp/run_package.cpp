// Runs an AOTInductor package without Python: run_package LIBRARY PACKAGE INPUT N C H W OUTPUT
// LIBRARY is `_cpu.so`, whose ops the package calls; INPUT and OUTPUT are float32 numbers, one after another.

#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

int main(int count, char** arguments) {
  if (count != 9) return std::cerr << "nine arguments\n", 2;
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) return std::cerr << dlerror() << '\n', 1;

  std::vector<int64_t> shape;
  for (int i = 4; i < 8; ++i) shape.push_back(std::atoll(arguments[i]));
  at::Tensor x = at::empty(shape);
  std::ifstream(arguments[3], std::ios::binary).read(static_cast<char*>(x.data_ptr()), x.nbytes());

  c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader package(arguments[2]);
  const at::Tensor y = package.run({x}).at(0).contiguous();
  std::ofstream(arguments[8], std::ios::binary).write(static_cast<const char*>(y.data_ptr()), y.nbytes());
}
