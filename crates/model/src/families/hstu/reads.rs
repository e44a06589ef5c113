//! What an HSTU model reads of events, candidates and users, by its configuration.

use super::config::{HstuConfig, VariantConfig};

impl HstuConfig {
    /// Whether it reads times: of events, and of the query.
    pub fn reads_times(&self) -> bool {
        match &self.variant {
            VariantConfig::Research(..) => self.stack.relative_bias.is_some(),
            VariantConfig::Dlrm(..) => true,
            VariantConfig::Nvidia(..) => false,
        }
    }

    /// Whether it reads actions.
    pub fn reads_actions(&self) -> bool {
        match &self.variant {
            VariantConfig::Research(input, _) => input.actions.is_some(),
            VariantConfig::Dlrm(..) => true,
            VariantConfig::Nvidia(input, _) => input.action_table.is_some(),
        }
    }

    /// The action of rows that are generated.
    pub fn generated_action(&self) -> Option<u32> {
        match &self.variant {
            VariantConfig::Research(input, _) => input.actions.map(|actions| actions.generated),
            VariantConfig::Dlrm(..) | VariantConfig::Nvidia(..) => None,
        }
    }

    /// Names of the features of events and candidates beside the item.
    pub fn item_features(&self) -> Vec<&str> {
        match &self.variant {
            VariantConfig::Dlrm(input, _) => input.features[1..].iter().map(|f| f.name.as_str()).collect(),
            VariantConfig::Research(..) | VariantConfig::Nvidia(..) => Vec::new(),
        }
    }

    /// Names of the features of users.
    pub fn user_features(&self) -> Vec<&str> {
        let contextual = match &self.variant {
            VariantConfig::Dlrm(input, _) => &input.contextual,
            VariantConfig::Nvidia(input, _) => &input.contextual,
            VariantConfig::Research(..) => return Vec::new(),
        };
        contextual.iter().map(|feature| feature.name.as_str()).collect()
    }
}
