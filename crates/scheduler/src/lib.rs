//! Continuous batching: a pure state machine, and the thread that drives it.
//!
//! Place in the flow: `server` turns HTTP into a [`Request`], the [`Engine`] hands it to the
//! [`Scheduler`], the scheduler writes a [`Plan`](beamline_model::step::Plan) per step, a
//! [`StepModel`](beamline_model::step::StepModel) carries it out, and the outcomes come back.
//! Reading order:
//!
//! | module | one idea |
//! | --- | --- |
//! | [`time`](crate::Micros) | time is a number that the caller passes in |
//! | [`request`](crate::Request) | what a client asks for |
//! | [`limits`](crate::Limits) | the bounds of a request, and the resources it will need |
//! | [`event`](crate::Event) | the output: slots opened and closed, requests ended |
//! | `pace` | how long steps take, and how wide a beam still makes its deadline |
//! | [`scheduler`](crate::Scheduler) | submit, plan, commit |
//! | [`lobby`](crate::Lobby) | the wait for pages from disk, before the queue |
//! | [`engine`](crate::Engine) | channels, clock, panics, answers |
//!
//! Invariants:
//!
//! - A request is admitted only with every page that it will ever need. So a running request never
//!   waits for memory: there is no preemption, no swapping and no deadlock.
//! - Requests that can meet their goal go first. Among them go first those of the tenant that was
//!   served least, and among those the most urgent. Requests that missed their goal are owed a
//!   share of the rows. So no request starves, and the burst of a tenant delays another by about a
//!   step.
//! - A request that could only be late, by the measured pace, is refused on arrival or dropped from
//!   the queue. So under overload, the requests that are computed are answered in time.
//! - Every accepted request ends exactly once. Its pages and slot are free afterwards.
//!
//! The state machine knows no tensors, no HTTP, no clock and no randomness; only the engine knows
//! time and threads.

#![forbid(unsafe_code)]

mod engine;
mod event;
mod limits;
mod lobby;
mod pace;
mod request;
mod scheduler;
mod time;

pub use beamline_model::step::ContextShape;
pub use engine::{Completed, Engine, EngineDied, EngineHandle, EngineStats, StartError, Ticket, Unserved};
pub use event::{Degraded, Ended, Ending, Event, Failure, Timings, Usage};
pub use limits::{ConfigError, Limits, SchedulerConfig};
pub use lobby::{Lobby, Ready};
pub use request::{Priority, Refusal, Request, RequestId};
pub use scheduler::{Scheduler, SchedulerStats};
pub use time::Micros;
