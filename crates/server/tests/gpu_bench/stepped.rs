//! An executor that says how long its steps take: each is waited for, while it is asked to.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use beamline_compute::cuda::device::Device;
use beamline_model::executor::ModelExecutor;
use beamline_model::step::{Plan, Progress, Slot, StepError, StepModel};
use beamline_model::task::{Answer, Job};

/// Milliseconds of steps, and whether they held context rows; nothing while nobody asks.
pub(crate) type Steps = Arc<Mutex<Option<Vec<(bool, f64)>>>>;

pub(crate) struct Stepped {
    pub(crate) inner: Box<dyn ModelExecutor>,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) steps: Steps,
}

impl StepModel for Stepped {
    type Payload = Job;
    type Answer = Answer;

    fn open(&mut self, slot: Slot, payload: Job) {
        self.inner.open(slot, payload);
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Answer>)>) -> Result<(), StepError> {
        let asked = self.steps.lock().unwrap().is_some();
        let start = Instant::now();
        self.inner.step(plan, outcomes)?;
        if asked {
            self.device.wait()?;
            let took = start.elapsed().as_secs_f64() * 1e3;
            if let Some(steps) = &mut *self.steps.lock().unwrap() {
                steps.push((!plan.chunks.is_empty(), took));
            }
        }
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        self.inner.close(slot);
    }
}
