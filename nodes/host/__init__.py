"""Everything that knows ComfyUI's model patching; nothing here knows a formula.

Its parts, from the ground up; imports only run down:

    settings    what was asked for, as values
    probe       measuring a run
    batch       one call of the model: its rows, its blocks
    networks    what a network is to guidance: UNets, transformers, the editor of attention
    run         one sampling call: its state, what joins, the two passes, the line in the log;
                `run/compat.py` holds what is done for each kind of other nodes' code
    show        sampling and decoding as the host does them, and words on a node
"""

from .networks import network_of as network_of
from .run.guidance import branches_of as branches_of
from .run.install import guided as guided
from .run.install import watch as watch
from .settings.branch import Branch as Branch
from .settings.changes import ChangeOutput as ChangeOutput
from .settings.changes import ChangeTokens as ChangeTokens
from .settings.changes import SkipBlock as SkipBlock
from .settings.changes import SmoothQueries as SmoothQueries
from .settings.errors import GuidanceError as GuidanceError
from .settings.perturbation import BlockPerturbation as BlockPerturbation
from .settings.perturbation import InputBlur as InputBlur
