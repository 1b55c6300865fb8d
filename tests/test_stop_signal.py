import os
import signal

import pytest

from training.stop_signal import StopSignal


def test_a_signal_is_noted_and_a_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.name is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.name == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
