"""Everything that knows ComfyUI's model patching; nothing here knows a formula.

The rooms, from the ground up; imports only run down:

    settings    what was asked for, as values
    calls       one call of the model: its rows, its blocks
    networks    what a network is to guidance: UNets, transformers
    probe       looking at a run
    sampling    one sampling call: runs, steps, passes, the line in the log
    show        what nodes that sample by themselves need of the host
"""

from .networks import network_of as network_of
from .sampling.attach import attach as attach
from .sampling.attach import guided as guided
from .sampling.attach import watch as watch
from .sampling.guidance import branches_of as branches_of
from .settings.branch import Branch as Branch
from .settings.branch import RescaleMode as RescaleMode
from .settings.branch import Side as Side
from .settings.changes import ChangeOutput as ChangeOutput
from .settings.changes import ChangeTokens as ChangeTokens
from .settings.changes import PassBy as PassBy
from .settings.changes import SmoothQueries as SmoothQueries
from .settings.perturbation import BlockPerturbation as BlockPerturbation
from .settings.perturbation import InputBlur as InputBlur
