import pytest

from tests.sglang_probe import probe


def test_without_an_accelerator_sglang_finds_our_platform_by_its_entry_point() -> None:
    assert probe()["current_platform"] == "CpuTorchNativePlatform"
    assert probe()["activated"]["no accelerator"] == "common.sglang.cpu_platform:CpuTorchNativePlatform"


@pytest.mark.parametrize("present", ["cuda", "another accelerator", "SGLang's CPU engine"])
def test_what_sglang_supports_itself_is_left_to_it(present: str) -> None:
    assert probe()["activated"][present] is None


def test_attention_runs_on_pytorch_alone() -> None:
    assert probe()["attention_backend"] == "torch_native"


def test_a_page_size_that_cannot_work_is_refused() -> None:
    assert probe()["page_size_error"] == "--page-size 4: only 1 works without a GPU"
