import subprocess
import sys


def test_inference_needs_neither_lightning_nor_datasets():
    code = (
        "import sys, dpnp_inference, dpnp_inference.cli; "
        "found = {'lightning', 'pytorch_lightning', 'datasets', 'dpnp_training'} & set(sys.modules); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
