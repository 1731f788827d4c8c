"""Which machine a plan reckons with."""

from serve_app.planner import _hardware
from serve_app.settings import Profile
from train_loop.plan import GPU_MFU, this_machine


def test_a_gpu_is_what_its_profile_says():
    gpu = _hardware(Profile(resources={"GPU": 1}, use_gpu=True, memory_gib=80, tflops=989, price_per_hour=3.5), 4)
    assert (gpu.device, gpu.memory_bytes, gpu.price_per_hour) == ("cuda", 80 << 30, 3.5)
    assert gpu.flops == 989e12 * GPU_MFU
    unknown = _hardware(Profile(resources={"GPU": 1}, use_gpu=True), 4)
    assert (unknown.memory_bytes, unknown.price_per_hour) == (None, None)


def test_cpu_workers_share_the_machine():
    machine, one_of_four = this_machine(), _hardware(Profile(resources={"CPU": 1}, price_per_hour=0.1), 4)
    assert (one_of_four.device, one_of_four.price_per_hour) == ("cpu", 0.1)
    assert one_of_four.memory_bytes == machine.memory_bytes // 4
    assert one_of_four.flops == machine.flops / 4
